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
#include "lanes_512.inl"
#include "panel.inl"
#include "panel_amx.inl"
// clang-format on

// Tokens from which on it pays to make tiles of the weights, as measured.
constexpr int64_t fewest_tokens(Format format) {
  switch (format) {
    case kBF16:
      return kRoundedTokens;
    case kQ8_0:
      return 10;
    case kQ4_0:
    case kQ4_0x16:
    case kQ4_0x32:
      return 12;
    case kF16:
      return 20;
    default:
      return 16;
  }
}

template <Format F>
constexpr PanelKernels panel = {kPaired,         fewest_tokens(F),   kManyPanelRows,
                                kAmxScratch,     amx_panel_bytes<1>, pack_tiles<F, 1>,
                                amx_panel_dot<1>};
template <Format F>
constexpr PanelKernels split = {kSplit,          fewest_tokens(F),   kManyPanelRows,
                                kAmxScratch,     amx_panel_bytes<2>, pack_tiles<F, 2>,
                                amx_panel_dot<2>};
template <>
constexpr PanelKernels panel<kF16> = split<kF16>;

template <Format F>
constexpr auto across = pack_across < F,
               F == kF16 ? 2 : 1 > ;

static int64_t turn_tiles(bool bytes, int64_t rounds) {
  static constexpr TileShapes kShapes = full_tiles();
  _tile_loadconfig(&kShapes);
  for (int64_t i = 0; i < rounds; ++i) {
    if (bytes) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
  return rounds * 4 * 2 * kRowsOfTile * kRowsOfTile * (kTileStride / (bytes ? 1 : 2));
}

}  // namespace THERMOCLINE_ISA

#define THERMOCLINE_FORMATS(kernel) \
  {{},                              \
   kernel<kF16>,                    \
   kernel<kBF16>,                   \
   kernel<kQ8_0>,                   \
   kernel<kQ4_0>,                   \
   kernel<kQ4_0x16>,                \
   kernel<kQ4_0x32>,                \
   kernel<kQ4_K>,                   \
   kernel<kQ4_Kx8>,                 \
   kernel<kQ5_K>,                   \
   kernel<kQ5_Kx8>,                 \
   kernel<kQ6_K>,                   \
   kernel<kQ6_Kx8>}

constexpr AmxKernels kAmxKernels = {
    THERMOCLINE_FORMATS(THERMOCLINE_ISA::panel),
    THERMOCLINE_ISA::pair_tokens<1>,
    THERMOCLINE_ISA::pair_tokens<2>,
    THERMOCLINE_FORMATS(THERMOCLINE_ISA::across),
    {{{}, THERMOCLINE_ISA::split<kF16>, {}, THERMOCLINE_ISA::split<kQ8_0>},
     {nullptr, THERMOCLINE_ISA::pack_across<kF16, 2>, nullptr, THERMOCLINE_ISA::pack_across<kQ8_0, 2>}},
    THERMOCLINE_ISA::turn_tiles,
};

}  // namespace thermocline
