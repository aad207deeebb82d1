#define THERMOCLINE_ISA avx512_level
#define THERMOCLINE_INT_DOT "dot_quads.inl"
#define THERMOCLINE_SUMS "sums.inl"
#define THERMOCLINE_LANES "lanes_512.inl"
#define THERMOCLINE_INT_PANELS "panel_int.inl"
#include "simd_avx512.h"
//
#include "kernels.inl"

namespace thermocline {
constexpr Kernels kAvx512Kernels = THERMOCLINE_ISA::make_kernels("avx512");

}  // namespace thermocline
