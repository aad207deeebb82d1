#define THERMOCLINE_ISA avx2_level
#define THERMOCLINE_INT_DOT "dot_quads.inl"
#define THERMOCLINE_SUMS "sums.inl"
#define THERMOCLINE_LANES "lanes_256.inl"
#define THERMOCLINE_INT_PANELS "panel_256.inl"
#include "quads_256.h"
//
#include "kernels.inl"

namespace thermocline {

constexpr Kernels kAvx2Kernels = THERMOCLINE_ISA::make_kernels("avx2");

}  // namespace thermocline
