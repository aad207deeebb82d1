#define THERMOCLINE_ISA avx512bf16_level
#include <string.h>

#include "kernels.h"
#include "simd_avx512.h"

namespace thermocline {
namespace THERMOCLINE_ISA {

// In the order in which they build on each other.
// clang-format off
#include "rows.inl"
#include "lanes_512.inl"
#include "panel.inl"
#include "panel_bf16.inl"
// clang-format on

}  // namespace THERMOCLINE_ISA

constexpr Bf16Kernels kAvx512Bf16Kernels = {
    {kRounded, kRoundedTokens, kPanelRows, 0, THERMOCLINE_ISA::bf16_panel_bytes, THERMOCLINE_ISA::pack_bf16,
     THERMOCLINE_ISA::bf16_panel_dot},
    THERMOCLINE_ISA::round_tokens,
};

}  // namespace thermocline
