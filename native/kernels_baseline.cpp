#define THERMOCLINE_ISA baseline_level
#define THERMOCLINE_INT_DOT "dot_blocks.inl"
#define THERMOCLINE_SUMS "sums_plain.inl"
#include "simd_baseline.h"
//
#include "kernels.inl"

namespace thermocline {

constexpr Kernels kBaselineKernels = THERMOCLINE_ISA::make_kernels("baseline");

}  // namespace thermocline
