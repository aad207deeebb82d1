// Products of integer panels by tiles. A tile of tokens meets one of rows over a block's columns; the
// integers go by way of memory to vectors, where scales meet them by the operations of panel_int.inl, in its
// order: the same bits.

// Tiles: two of sums, two of tokens, two of rows.
static constexpr TileShapes int_shapes(int tokens) {
  TileShapes shapes;
  for (int i = 0; i < 6; ++i) {
    shapes.rows[i] = static_cast<uint8_t>(i < 4 ? tokens : kBlock / 4);
    shapes.row_bytes[i] = static_cast<uint16_t>(i / 2 == 1 ? kBlock : kTileStride);
  }
  return shapes;
}

// The blocks of T tokens and of half of a panel. A sum is read three steps after tiles begin with it, for
// they answer late.
template <Format F, int T>
struct IntTiles {
  const uint8_t* panel;
  const TokenBlock* tokens;
  int64_t blocks;
  alignas(64) int32_t whole[4][T][kLanes];

  // Begins with block b, and gives the one before it to memory.
  void begin(int64_t b) {
#define THERMOCLINE_BEGIN(sum, before, token, row)            \
  if (b < blocks) {                                           \
    _tile_loadd(token, tokens[b].q[0], kBlock);               \
    _tile_loadd(row, panel + b * kPanelBlock<F>, kUnitBytes); \
  }                                                           \
  _tile_stored(before, whole[(b + 3) % 4], kTileStride);      \
  if (b < blocks) {                                           \
    _tile_zero(sum);                                          \
    _tile_dpbssd(sum, token, row);                            \
  }
    if (b % 2 == 0) {
      THERMOCLINE_BEGIN(0, 1, 2, 4)
    } else {
      THERMOCLINE_BEGIN(1, 0, 3, 5)
    }
#undef THERMOCLINE_BEGIN
  }

  void add_block(int64_t b, Vec (&sums)[T][1]) {
    begin(b + 3);
    const uint8_t* rest = panel + b * kPanelBlock<F> + 9 * kUnitBytes;
    const Vec scale = load(rest);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const Vec sum = _mm512_cvtepi32_ps(_mm512_load_si512(whole[b % 4][t]));
      sums[t][0] = fma(sum, mul(scale, splat(tokens[b].d[t])), sums[t][0]);
    }
    if constexpr (has_minima(F)) {
      const Vec least = load(rest + kUnitBytes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t][0] = _mm512_fnmadd_ps(least, splat(tokens[b].lifts[t]), sums[t][0]);
    }
  }
};

template <Format F, int T>
static void amx_int_tile(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t t0,
                         int64_t count) {
  const int64_t blocks = job.columns / kBlock;
  IntTiles<F, T> tiles;
  tiles.panel = panel;
  tiles.tokens = job.tokens.blocks + t0 / kGroupTokens * blocks;
  tiles.blocks = blocks;
  tiles.begin(0);
  tiles.begin(1);
  tiles.begin(2);
  PassTree<T, 2, 1> tree;
  int64_t b = 0;
  for (int pass = 0; pass < kIntPasses; ++pass) {
    Vec sums[T][1];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[t][0] = zero();
    for (const int64_t end = b + blocks_of_pass(pass, blocks); b < end; ++b) tiles.add_block(b, sums);
    tree.put(pass, sums);
  }
  store_rows(job, tree.total()[0], 1, r0, r1, t0, count);
}

// A group of tokens, which stays in the first cache, meets all panels, which stay in the second.
template <Format F>
static void amx_int_dot(const DotJob& job, const uint8_t* panels, int64_t r0, int64_t r1, int64_t tokens,
                        uint8_t*) {
  static constexpr TileShapes kAll = int_shapes(16), kFew = int_shapes(8);
  for (int64_t t = 0; t < tokens; t += kGroupTokens) {
    const int64_t count = tokens - t < kGroupTokens ? tokens - t : kGroupTokens;
    _tile_loadconfig(count > 8 ? &kAll : &kFew);
    for (int64_t r = r0; r < r1; r += kLanes) {
      const uint8_t* panel = panels + (r - r0) / kPanelRows * int_panel_bytes<F>(job.columns) +
                             (r - r0) / kLanes % kPanelVecs * sizeof(Vec);
      if (count > 8) {
        amx_int_tile<F, 16>(job, panel, r, r1, t, count);
      } else {
        amx_int_tile<F, 8>(job, panel, r, r1, t, count);
      }
    }
  }
  _tile_release();
}
