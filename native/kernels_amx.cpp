#define THERMOCLINE_ISA amx_level
#include <string.h>

#include "kernels.h"
#include "simd_avx512.h"

namespace thermocline {
namespace THERMOCLINE_ISA {

// In the order in which they build on each other.
// clang-format off
#include "rows.inl"
#include "parts.inl"
#include "panel.inl"
#include "panel_amx.inl"
// clang-format on

template <Format F>
constexpr PanelKernels panel = {kPaired,         kManyPanelRows, kAmxScratch,
                                amx_panel_bytes, pack_tiles<F>,  amx_panel_dot};

}  // namespace THERMOCLINE_ISA

#define THERMOCLINE_FORMATS(kernel) \
  {{}, {}, kernel<kBF16>, kernel<kQ8_0>, kernel<kQ4_0>, kernel<kQ4_K>, kernel<kQ5_K>, kernel<kQ6_K>}

constexpr AmxKernels kAmxKernels = {
    THERMOCLINE_FORMATS(THERMOCLINE_ISA::panel),
    THERMOCLINE_ISA::pair_tokens,
    THERMOCLINE_FORMATS(THERMOCLINE_ISA::pack_across),
};

}  // namespace thermocline
