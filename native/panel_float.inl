// Panels of F32, F16 and BF16, widened to floats. Tokens lie in tiles of kTileTokens, column by column.
//
// A lane of dot.inl sums every column that is a vector after the one before: these are taken in one pass
// here, the passes in the order in which sum4 adds up the lanes, so that the sums are the same to the bit.

constexpr int kFloatPasses = kLanes, kFloatLevels = kLanes == 16 ? 4 : 3;
static_assert(1 << kFloatLevels == kLanes);

// Vectors of rows and tokens whose sums are kept in registers.
constexpr int kFloatVecs = 2, kFloatTile = kLanes == 16 ? 12 : 6;
static_assert(kPanelVecs % kFloatVecs == 0 && kTileTokens % kFloatTile == 0);

// The pass that takes columns c, c + kLanes, ...
static inline int pass_of_lane(int c) {
  constexpr int kSecond[4] = {0, kLanes == 16 ? 2 : 1, 1, 3};
  return c % 4 * (kLanes / 4) + kSecond[c / 4];
}

static int64_t float_panel_bytes(int64_t columns) { return columns * kPanelRows * 4; }

// Columns come pass by pass, then the last ones that fill no vector.
static inline int64_t place_of_columns(int lane, int64_t step, int64_t steps) {
  return pass_of_lane(lane) * steps + step;
}

template <Format F>
static void pack_floats(const Rows& rows, int64_t r0, int64_t r1, int64_t columns, uint8_t* panel) {
  const int64_t steps = columns / kLanes;
  float* to = reinterpret_cast<float*>(panel);
  for (int v = 0; v < kPanelVecs; ++v, to += kLanes) {
    const PanelLanes lanes(rows, r0, r1, v);
    for (int64_t s = 0; s < steps; ++s) {
      Int w[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) w[i] = bits_of(load_row<F>(lanes.row[i], s * kLanes));
      transpose(w);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c)
        store_first<kLanes>(to + place_of_columns(c, s, steps) * kPanelRows, w[c]);
    }
    for (int64_t c = steps * kLanes; c < columns; ++c) {
      for (int i = 0; i < kLanes; ++i) to[c * kPanelRows + i] = load_one<F>(lanes.row[i], c);
    }
  }
}

// Those from t on, of which a tile holds as many as a vector or its rest; those past `count` are zeros.
template <int t>
static inline void tile_lanes(const float* x, int64_t x_stride, int64_t count, int64_t columns, float* out) {
  constexpr int kTokens = kTileTokens - t < kLanes ? kTileTokens - t : kLanes;
  const int64_t steps = columns / kLanes;
  for (int64_t s = 0; s < steps; ++s) {
    Int v[kLanes];
    for (int i = 0; i < kLanes; ++i)
      v[i] = bits_of(t + i < count ? load(x + (t + i) * x_stride + s * kLanes) : zero());
    transpose(v);
    for (int c = 0; c < kLanes; ++c)
      store_first<kTokens>(out + place_of_columns(c, s, steps) * kTileTokens + t, v[c]);
  }
}

static void tile_tokens(const float* x, int64_t x_stride, int64_t count, int64_t columns, float* out) {
  tile_lanes<0>(x, x_stride, count, columns, out);
  if constexpr (kLanes < kTileTokens) tile_lanes<kLanes>(x, x_stride, count, columns, out);
  for (int64_t c = columns / kLanes * kLanes; c < columns; ++c) {
    for (int t = 0; t < kTileTokens; ++t) out[c * kTileTokens + t] = t < count ? x[t * x_stride + c] : 0.0f;
  }
}

// Vectors `first` .. first + kFloatVecs of the panel's rows, and up to T tokens, which begin at x.
template <int T>
static void float_panel_tile(const DotJob& job, const float* w, const float* x, int first, int64_t r0,
                             int64_t r1, int64_t t0, int64_t count) {
  const int64_t steps = job.columns / kLanes;
  w += first * kLanes;
  PassTree<T, kFloatLevels, kFloatVecs> tree;
  for (int pass = 0; pass < kFloatPasses; ++pass) {
    Vec sums[T][kFloatVecs];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = zero();
    for (int64_t s = 0; s < steps; ++s, w += kPanelRows, x += kTileTokens) {
      const Vec w0 = load(w), w1 = load(w + kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const Vec now = splat(x[t]);
        sums[t][0] = fma(w0, now, sums[t][0]);
        sums[t][1] = fma(w1, now, sums[t][1]);
      }
    }
    tree.put(pass, sums);
  }
  Vec total[T][kFloatVecs];
  memcpy(total, tree.total(), sizeof total);
  for (int64_t c = steps * kLanes; c < job.columns; ++c, w += kPanelRows, x += kTileTokens) {
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < kFloatVecs; ++v)
        total[t][v] = add(total[t][v], mul(load(w + v * kLanes), splat(x[t])));
    }
  }
  for (int v = 0; v < kFloatVecs; ++v)
    store_rows(job, total[0] + v, kFloatVecs, r0 + (first + v) * kLanes, r1, t0, count);
}

static void float_panel_dot(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
                            uint8_t*) {
  const float* w = reinterpret_cast<const float*>(panel);
  for (int64_t t = 0; t < tokens; t += kFloatTile) {
    const float* x = job.tokens.tiles + t / kTileTokens * kTileTokens * job.columns + t % kTileTokens;
    const int64_t count = tokens - t < kFloatTile ? tokens - t : kFloatTile;
    for (int v = 0; v < kPanelVecs && r0 + v * kLanes < r1; v += kFloatVecs) {
      if (count > kFloatTile / 3 * 2) {
        float_panel_tile<kFloatTile>(job, w, x, v, r0, r1, t, count);
      } else if (count > kFloatTile / 3) {
        float_panel_tile<kFloatTile / 3 * 2>(job, w, x, v, r0, r1, t, count);
      } else {
        float_panel_tile<kFloatTile / 3>(job, w, x, v, r0, r1, t, count);
      }
    }
  }
}
