// All kernels of one instruction set. Included by kernels_<isa>.cpp after THERMOCLINE_ISA is defined and the
// simd header of the level is included, and THERMOCLINE_INT_DOT and THERMOCLINE_SUMS name its integer dot
// products and weighted sums. Includes C headers only: templates of the C++ library would be compiled for
// this instruction set and could be picked by the linker for all the program.

#include <math.h>
#include <string.h>

#include "kernels.h"

namespace thermocline::THERMOCLINE_ISA {

// In the order in which they build on each other.
// clang-format off
#include "rows.inl"
#include "parts.inl"
#include THERMOCLINE_INT_DOT
#include "dot.inl"
#include "axpy.inl"
#include "sums_unit.inl"
#include "sums_tile.inl"
#include THERMOCLINE_SUMS
#include "sums_finish.inl"
#ifdef THERMOCLINE_LANES
#include THERMOCLINE_LANES
#include "panel.inl"
#include THERMOCLINE_INT_PANELS
#include "panel_float.inl"
#endif
#include "elementwise.inl"
#include "layer_norm.inl"
#include "scan.inl"
// clang-format on

#define THERMOCLINE_FORMATS(kernel)                                                    \
  {kernel<kF32>,     kernel<kF16>,     kernel<kBF16>,  kernel<kQ8_0>,   kernel<kQ4_0>, \
   kernel<kQ4_0x16>, kernel<kQ4_0x32>, kernel<kQ4_K>,  kernel<kQ4_Kx8>, kernel<kQ5_K>, \
   kernel<kQ5_Kx8>,  kernel<kQ6_K>,    kernel<kQ6_Kx8>}

#define THERMOCLINE_INTEGER_FORMATS(kernel)                                            \
  {nullptr,          nullptr,          nullptr,        kernel<kQ8_0>,   kernel<kQ4_0>, \
   kernel<kQ4_0x16>, kernel<kQ4_0x32>, kernel<kQ4_K>,  kernel<kQ4_Kx8>, kernel<kQ5_K>, \
   kernel<kQ5_Kx8>,  kernel<kQ6_K>,    kernel<kQ6_Kx8>}

#ifdef THERMOCLINE_LANES
template <Format F>
constexpr PanelKernels panel = {kTiled,         kFloatPanelTokens<F>, kPanelRows, 0, float_panel_bytes,
                                pack_floats<F>, float_panel_dot};
#define THERMOCLINE_INT_PANEL(F)                                                              \
  template <>                                                                                 \
  constexpr PanelKernels panel<F> = {kPanelForm<F>,      kIntPanelTokens, kPanelRows,      0, \
                                     int_panel_bytes<F>, pack_ints<F>,    int_panel_dot<F>};
THERMOCLINE_INT_PANEL(kQ8_0)
THERMOCLINE_INT_PANEL(kQ4_0)
THERMOCLINE_INT_PANEL(kQ4_0x16)
THERMOCLINE_INT_PANEL(kQ4_0x32)
THERMOCLINE_INT_PANEL(kQ4_K)
THERMOCLINE_INT_PANEL(kQ4_Kx8)
THERMOCLINE_INT_PANEL(kQ5_K)
THERMOCLINE_INT_PANEL(kQ5_Kx8)
THERMOCLINE_INT_PANEL(kQ6_K)
THERMOCLINE_INT_PANEL(kQ6_Kx8)
#undef THERMOCLINE_INT_PANEL
#else
template <Format F>
constexpr PanelKernels panel = {};
constexpr auto tile_tokens = nullptr;
#endif

static constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      quantize,
      THERMOCLINE_FORMATS(dot),
      {panel<kF32>, panel<kF16>, panel<kBF16>, panel<kQ8_0>, panel<kQ4_0>, panel<kQ4_0x16>, panel<kQ4_0x32>,
       panel<kQ4_K>, panel<kQ4_Kx8>, panel<kQ5_K>, panel<kQ5_Kx8>, panel<kQ6_K>, panel<kQ6_Kx8>},
      tile_tokens,
      nullptr,
      nullptr,
      nullptr,
      {},
      THERMOCLINE_FORMATS(axpy),
      add_listed,
      largest_factor,
      THERMOCLINE_INTEGER_FORMATS(add_sums),
      THERMOCLINE_INTEGER_FORMATS(largest_scale),
      THERMOCLINE_INTEGER_FORMATS(finish_sums),
      THERMOCLINE_FORMATS(dequantize),
      THERMOCLINE_FORMATS(first_nonfinite),
      activate,
      select,
      flag_nonzero,
      list_flags,
      close_gates,
      rms_norm,
      layer_norm,
      rope,
      softmax_part,
      reduce,
      to_half,
      checksum,
      {},
      {},
      quad_tokens,
  };
}

#undef THERMOCLINE_FORMATS
#undef THERMOCLINE_INTEGER_FORMATS

}  // namespace thermocline::THERMOCLINE_ISA
