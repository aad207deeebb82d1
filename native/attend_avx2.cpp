#define THERMOCLINE_ISA avx2_level
#include "simd_avx2.h"

namespace thermocline::THERMOCLINE_ISA {

constexpr int kScoreQueries = 4, kMixVecs = 8;

// What sum() gives for each, in the same order: the halves are added first, then neighbours.
static inline Vec sum_all(const Vec (&acc)[kLanes]) {
  Vec four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    four[i] = add(_mm256_permute2f128_ps(acc[i], acc[i + 4], 0x20),
                  _mm256_permute2f128_ps(acc[i], acc[i + 4], 0x31));
  return _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
}

// Integer products are those of dot.
constexpr auto score_bytes = nullptr;

}  // namespace thermocline::THERMOCLINE_ISA

#include "attend.inl"

namespace thermocline {

constexpr AttendKernels kAvx2Attend = THERMOCLINE_ISA::make_attend();

}  // namespace thermocline
