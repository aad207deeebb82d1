// Panels for AMX: weights of any format as BF16, in tiles of kRowsOfTile rows by kPairColumns numbers, for
// tokens rounded to BF16. A tile of weights meets one of tokens in a single instruction, which adds 16 x 16
// products of 32 columns to sums that stay in tiles; an element adds its columns in ascending order. Numbers
// below the smallest normal one count as zero.
//
// P = 1, or 2 where every number is split in two of BF16, the second of which is what the first one lacks:
// F16 is whole then, and tokens are off by 2^-16 at most. All products are taken but that of two second
// parts.

constexpr int64_t kRowsOfTile = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileStride = 64;
static_assert(kPanelRows == 2 * kRowsOfTile && kGroupTokens == kRowsOfTile);

static inline int64_t tile_steps(int64_t columns) { return (columns + kPairColumns - 1) / kPairColumns; }

// Of a panel: two tiles of first parts, then those of the second parts. Of a group of tokens: half of that.
template <int P>
constexpr int64_t kStepBytes = P * 2 * kTileBytes;
template <int P>
constexpr int64_t kStepPairs = P * kTileBytes / 2;  // numbers

template <int P>
static int64_t amx_panel_bytes(int64_t columns) {
  return tile_steps(columns) * kStepBytes<P>;
}

static inline __mmask32 mask_of(int64_t left) { return left >= kPairColumns ? 0xFFFFFFFF : (1u << left) - 1; }

static inline __m512i round_pairs(Vec low, Vec high) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
  __m512i bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

// What rounding took off; nothing where a number is not finite, for whatever that meets is not either.
static inline Vec taken_off(Vec x, __m256i rounded) {
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
  const Vec rest = _mm512_sub_ps(x, _mm512_castsi512_ps(bits));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
}

// 32 numbers as P of BF16 each.
template <int P>
[[gnu::always_inline]] static inline void take_parts(Vec low, Vec high, __m512i (&parts)[P]) {
  parts[0] = round_pairs(low, high);
  if constexpr (P == 2) {
    parts[1] = round_pairs(taken_off(low, _mm512_castsi512_si256(parts[0])),
                           taken_off(high, _mm512_extracti64x4_epi64(parts[0], 1)));
  }
}

// The 32 numbers of step s of a row; zeros past the last.
template <Format F, int P>
[[gnu::always_inline]] static inline void load_pairs(const uint8_t* row, int64_t s, int64_t columns,
                                                     __m512i (&parts)[P]) {
  const __mmask32 mask = mask_of(columns - s * kPairColumns);
  if constexpr (F == kBF16) {
    parts[0] = _mm512_maskz_loadu_epi16(mask, row + s * kTileStride);
  } else if constexpr (F == kF16) {
    const __m512i bits = _mm512_maskz_loadu_epi16(mask, row + s * kTileStride);
    take_parts<P>(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                  _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), parts);
  } else {
    Vec w[2];
    load_block<F>(part_at<F>(row, s), w);
    take_parts<P>(w[0], w[1], parts);
  }
}

// A few steps of all rows at a time, so that what is written lies together; what is read next is fetched
// meanwhile, some lines of every row by turns.
constexpr int64_t kPackSteps = 8;

template <Format F, int P>
static void pack_tiles(const Rows& rows, int64_t r0, int64_t r1, int64_t columns, uint8_t* panel) {
  constexpr int64_t step_bytes = kPairColumns * kFormatInfo[F].block_bytes / kFormatInfo[F].block;
  const int64_t steps = tile_steps(columns);
  for (int64_t s0 = 0; s0 < steps; s0 += kPackSteps) {
    const int64_t s1 = s0 + kPackSteps < steps ? s0 + kPackSteps : steps;
    for (int64_t i = 0; i < kPanelRows; ++i) {
      // The last row again in place of those past the end, whose sums are not stored.
      const int64_t r = r0 + i < r1 ? r0 + i : r1 - 1;
      const uint8_t *row = row_at(rows, r), *ahead = row + s1 * step_bytes;
      if (s1 == steps && r + kPanelRows < rows.count) ahead = row_at(rows, r + kPanelRows);
      uint8_t* to = panel + s0 * kStepBytes<P> + i * kTileStride;
      for (int64_t b = 0; b < kPackSteps * step_bytes; b += 64) __builtin_prefetch(ahead + b, 0, 2);
      for (int64_t s = s0; s < s1; ++s, to += kStepBytes<P>) {
        __m512i parts[P];
        load_pairs<F>(row, s, columns, parts);
        for (int p = 0; p < P; ++p) _mm512_storeu_si512(to + p * 2 * kTileBytes, parts[p]);
      }
    }
  }
}

// 32 numbers of each of 32 rows: column c of them becomes row c of a panel's step.
static inline void turn_step(const __m512i (&rows)[32], uint8_t* to) {
  __m512i low[16], high[16];  // columns 0 to 3, 8 to 11 and so on, and those between
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    low[i] = _mm512_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);
    high[i] = _mm512_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);
  }
  transpose(low);
  transpose(high);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int column = i / 4 * 8 + i % 4;
    _mm512_storeu_si512(to + column * kTileStride, low[i]);
    _mm512_storeu_si512(to + (column + 4) * kTileStride, high[i]);
  }
}

template <Format F, int P>
static void pack_across(const Rows& rows, int64_t steps, int64_t c0, int64_t c1, int64_t columns,
                        uint8_t* panels) {
  const int64_t pieces = (c1 - c0 + kPairColumns - 1) / kPairColumns;
  __m512i numbers[kAcrossColumns / kPairColumns][P][32];
  for (int64_t s = 0; s < steps; ++s) {
    for (int i = 0; i < 32; ++i) {
      const int32_t id = rows.ids[s * 32 + i];
      const uint8_t* row = rows.base + id * rows.row_bytes;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        __m512i parts[P] = {};
        if (id >= 0) load_pairs<F>(row, c0 / kPairColumns + piece, columns, parts);
        for (int p = 0; p < P; ++p) numbers[piece][p][i] = parts[p];
      }
    }
    for (int64_t piece = 0; piece < pieces; ++piece) {
      uint8_t* to = panels + (piece * steps + s) * kStepBytes<P>;
      for (int p = 0; p < P; ++p) turn_step(numbers[piece][p], to + p * 2 * kTileBytes);
    }
  }
}

// Up to kGroupTokens tokens to tiles, a pair of columns of all tokens after the other; zeros for what is not
// there.
template <int P>
static void pair_tokens(const float* x, int64_t x_stride, int64_t count, int64_t columns, uint16_t* out) {
  for (int64_t s = 0; s < tile_steps(columns); ++s, out += kStepPairs<P>) {
    const __mmask32 mask = mask_of(columns - s * kPairColumns);
    const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    __m512i v[P][16];
    for (int t = 0; t < 16; ++t) {
      const float* from = x + t * x_stride + s * kPairColumns;
      __m512i parts[P] = {};
      if (t < count)
        take_parts<P>(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 16), parts);
      for (int p = 0; p < P; ++p) v[p][t] = parts[p];
    }
    for (int p = 0; p < P; ++p) {
      transpose(v[p]);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + p * kTileBytes / 2 + i * 32, v[p][i]);
    }
  }
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

static constexpr TileShapes full_tiles() {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = kTileStride;
    shapes.rows[i] = kRowsOfTile;
  }
  return shapes;
}

// Columns of which two groups of tokens stay in the first cache, and rows in the second, while they meet, and
// tokens of which the sums wait there in the meantime.
template <int P>
constexpr int64_t kChunkSteps = 8 / P;
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kPairsOfBlock = kBlockTokens / (2 * kGroupTokens);

// Sums of 32 rows and two groups of tokens, tile by tile: of half v of the rows and group g.
struct alignas(64) TileSums {
  float at[2][2][kRowsOfTile][kGroupTokens];
};

// Room for kManyPanelRows rows and kBlockTokens tokens, or for more rows and as many fewer tokens.
static constexpr int64_t kAmxScratch = kManyPanelRows / kPanelRows * kPairsOfBlock * sizeof(TileSums);

// Adds a panel times the tokens of two groups. Tiles 0 to 3 are the sums, 4 and 5 rows, 6 and 7 tokens.
template <int P>
static inline void multiply_two(const uint8_t* w, const uint16_t* x0, const uint16_t* x1, int64_t steps,
                                bool first, TileSums& sums) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums.at[0][0], kTileStride);
    _tile_loadd(1, sums.at[0][1], kTileStride);
    _tile_loadd(2, sums.at[1][0], kTileStride);
    _tile_loadd(3, sums.at[1][1], kTileStride);
  }
  for (int64_t s = 0; s < steps; ++s, w += kStepBytes<P>, x0 += kStepPairs<P>, x1 += kStepPairs<P>) {
    _tile_loadd(4, w, kTileStride);
    _tile_loadd(6, x0, kTileStride);
    _tile_loadd(7, x1, kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w + kTileBytes, kTileStride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if constexpr (P == 2) {
      _tile_loadd(4, w + 2 * kTileBytes, kTileStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(4, w + 3 * kTileBytes, kTileStride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
      _tile_loadd(6, x0 + kTileBytes / 2, kTileStride);
      _tile_loadd(7, x1 + kTileBytes / 2, kTileStride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(4, w, kTileStride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, sums.at[0][0], kTileStride);
  _tile_stored(1, sums.at[0][1], kTileStride);
  _tile_stored(2, sums.at[1][0], kTileStride);
  _tile_stored(3, sums.at[1][1], kTileStride);
}

// The same for one group, with the same bits.
template <int P>
static inline void multiply_one(const uint8_t* w, const uint16_t* x, int64_t steps, bool first,
                                TileSums& sums) {
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
  } else {
    _tile_loadd(0, sums.at[0][0], kTileStride);
    _tile_loadd(2, sums.at[1][0], kTileStride);
  }
  for (int64_t s = 0; s < steps; ++s, w += kStepBytes<P>, x += kStepPairs<P>) {
    _tile_loadd(6, x, kTileStride);
    _tile_loadd(4, w, kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + kTileBytes, kTileStride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (P == 2) {
      _tile_loadd(1, w + 2 * kTileBytes, kTileStride);
      _tile_dpbf16ps(0, 1, 6);
      _tile_loadd(3, w + 3 * kTileBytes, kTileStride);
      _tile_dpbf16ps(2, 3, 6);
      _tile_loadd(7, x + kTileBytes / 2, kTileStride);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(2, 5, 7);
    }
  }
  _tile_stored(0, sums.at[0][0], kTileStride);
  _tile_stored(2, sums.at[1][0], kTileStride);
}

// The sums of group g, of `count` tokens from t on, to their places.
static inline void store_group(const DotJob& job, const TileSums& sums, int g, int64_t r0, int64_t r1,
                               int64_t t, int64_t count) {
  Vec turned[kGroupTokens][kPanelVecs];
  for (int v = 0; v < kPanelVecs; ++v) {
    __m512i row[16];
    for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(sums.at[v][g][i]);
    transpose(row);
    for (int i = 0; i < 16; ++i) turned[i][v] = _mm512_castsi512_ps(row[i]);
  }
  store_sums(job, turned[0], r0, r1, t, count);
}

// What one step of the loops below has to do: steps s0 .. s1 for the tokens t .. t1, at most two groups.
struct TileWork {
  const DotJob& job;
  const uint8_t* panel;
  int64_t r0, r1, steps, s0, s1, t, t1;
  TileSums* sums;
};

template <int P>
static inline void multiply_panels(const TileWork& work) {
  const int64_t group = work.steps * kStepPairs<P>, second = work.t1 - work.t - kGroupTokens;
  const uint16_t* pairs = P == 2 ? work.job.tokens.split : work.job.tokens.pairs;
  const uint16_t* x = pairs + work.t / kGroupTokens * group + work.s0 * kStepPairs<P>;
  const uint8_t* w = work.panel + work.s0 * kStepBytes<P>;
  const bool first = work.s0 == 0, last = work.s1 == work.steps;
  TileSums* sums = work.sums;
  for (int64_t r = work.r0; r < work.r1; r += kPanelRows, w += work.steps * kStepBytes<P>) {
    if (second > 0) {
      multiply_two<P>(w, x, x + group, work.s1 - work.s0, first, *sums);
    } else {
      multiply_one<P>(w, x, work.s1 - work.s0, first, *sums);
    }
    if (last) {
      store_group(work.job, *sums, 0, r, work.r1, work.t, second > 0 ? kGroupTokens : work.t1 - work.t);
      if (second > 0) store_group(work.job, *sums, 1, r, work.r1, work.t + kGroupTokens, second);
    }
    if (!first || !last) ++sums;
  }
}

template <int P>
static void amx_panel_dot(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
                          uint8_t* scratch) {
  static constexpr TileShapes kShapes = full_tiles();
  _tile_loadconfig(&kShapes);
  const int64_t steps = tile_steps(job.columns), panels = (r1 - r0 + kPanelRows - 1) / kPanelRows;
  auto* sums = reinterpret_cast<TileSums*>(scratch);
  for (int64_t t0 = 0; t0 < tokens; t0 += kBlockTokens) {
    const int64_t t1 = tokens - t0 < kBlockTokens ? tokens : t0 + kBlockTokens;
    int64_t s0 = 0;
    do {
      const int64_t s1 = steps - s0 < 2 * kChunkSteps<P> ? steps : s0 + kChunkSteps<P>;
      for (int64_t t = t0; t < t1; t += 2 * kGroupTokens) {
        const int64_t end = t1 - t < 2 * kGroupTokens ? t1 : t + 2 * kGroupTokens;
        multiply_panels<P>(
            {job, panel, r0, r1, steps, s0, s1, t, end, sums + (t - t0) / (2 * kGroupTokens) * panels});
      }
      s0 = s1;
    } while (s0 < steps);
  }
  _tile_release();
}
