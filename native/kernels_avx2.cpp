#define THERMOCLINE_ISA avx2_level
#define THERMOCLINE_INT_DOT "dot_blocks.inl"
#include "simd_avx2.h"
//
#include "kernels.inl"

namespace thermocline {

constexpr Kernels kAvx2Kernels = THERMOCLINE_ISA::make_kernels("avx2");

}  // namespace thermocline
