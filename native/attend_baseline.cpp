#define THERMOCLINE_ISA baseline_level
#include "simd_baseline.h"

namespace thermocline::THERMOCLINE_ISA {

constexpr int kScoreQueries = 2, kMixVecs = 8;

static inline Vec sum_all(const Vec (&acc)[kLanes]) {
  float sums[kLanes];
  sum4(acc[0], acc[1], acc[2], acc[3], sums);
  return load(sums);
}

// Integer products are those of dot.
constexpr auto score_bytes = nullptr;

}  // namespace thermocline::THERMOCLINE_ISA

#include "attend.inl"

namespace thermocline {

constexpr AttendKernels kBaselineAttend = THERMOCLINE_ISA::make_attend();

}  // namespace thermocline
