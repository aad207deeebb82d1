#define THERMOCLINE_ISA avxvnni_level
#define THERMOCLINE_VNNI
#include <string.h>

#include "kernels.h"
#include "quads_256.h"

namespace thermocline {
namespace THERMOCLINE_ISA {

// In the order in which they build on each other.
// clang-format off
#include "rows.inl"
#include "parts.inl"
#include "dot_quads.inl"
#include "dot.inl"
#include "sums_tile.inl"
#include "sums.inl"
#include "sums_finish.inl"
#include "lanes_256.inl"
#include "panel.inl"
#include "panel_256.inl"
// clang-format on

template <Format F>
constexpr PanelKernels panel = {kPanelForm<F>,      kIntPanelTokens, kPanelRows,      0,
                                int_panel_bytes<F>, pack_ints<F>,    int_panel_dot<F>};

}  // namespace THERMOCLINE_ISA

#define THERMOCLINE_INTEGER_FORMATS(kernel)                                            \
  {nullptr,          nullptr,          nullptr,        kernel<kQ8_0>,   kernel<kQ4_0>, \
   kernel<kQ4_0x16>, kernel<kQ4_0x32>, kernel<kQ4_K>,  kernel<kQ4_Kx8>, kernel<kQ5_K>, \
   kernel<kQ5_Kx8>,  kernel<kQ6_K>,    kernel<kQ6_Kx8>}
constexpr VnniKernels kAvxVnniKernels = {
    THERMOCLINE_INTEGER_FORMATS(THERMOCLINE_ISA::dot),
    {{},
     {},
     {},
     THERMOCLINE_ISA::panel<kQ8_0>,
     THERMOCLINE_ISA::panel<kQ4_0>,
     THERMOCLINE_ISA::panel<kQ4_0x16>,
     THERMOCLINE_ISA::panel<kQ4_0x32>,
     THERMOCLINE_ISA::panel<kQ4_K>,
     THERMOCLINE_ISA::panel<kQ4_Kx8>,
     THERMOCLINE_ISA::panel<kQ5_K>,
     THERMOCLINE_ISA::panel<kQ5_Kx8>,
     THERMOCLINE_ISA::panel<kQ6_K>,
     THERMOCLINE_ISA::panel<kQ6_Kx8>},
    THERMOCLINE_INTEGER_FORMATS(THERMOCLINE_ISA::add_sums),
    THERMOCLINE_INTEGER_FORMATS(THERMOCLINE_ISA::finish_sums),
};

}  // namespace thermocline
