// Panels of F32, F16 and BF16, widened to floats. Tokens lie in tiles of kTileTokens, column by column.
//
// A lane of dot.inl sums every sixteenth column: these are taken in one pass here, the passes in the order in
// which sum4 adds up the lanes, so that the sums are the same to the bit.

constexpr int kFloatPasses = kLanes;

// The pass that takes columns c, c + 16, ...
static inline int pass_of_lane(int c) {
  constexpr int kSecond[4] = {0, 2, 1, 3};
  return c % 4 * 4 + kSecond[c / 4];
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
      __m512i w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) w[i] = _mm512_castps_si512(load_row<F>(lanes.row[i], s * kLanes));
      transpose(w);
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) _mm512_storeu_si512(to + place_of_columns(c, s, steps) * kPanelRows, w[c]);
    }
    for (int64_t c = steps * kLanes; c < columns; ++c) {
      for (int i = 0; i < kLanes; ++i) to[c * kPanelRows + i] = load_one<F>(lanes.row[i], c);
    }
  }
}

// Tokens past `count` are zeros.
static void tile_tokens(const float* x, int64_t x_stride, int64_t count, int64_t columns, float* out) {
  const int64_t steps = columns / kLanes;
  constexpr __mmask16 kMask = (1 << kTileTokens) - 1;
  for (int64_t s = 0; s < steps; ++s) {
    __m512i v[16];
    for (int t = 0; t < 16; ++t)
      v[t] = t < count ? _mm512_loadu_si512(x + t * x_stride + s * kLanes) : _mm512_setzero_si512();
    transpose(v);
    for (int c = 0; c < 16; ++c)
      _mm512_mask_storeu_epi32(out + place_of_columns(c, s, steps) * kTileTokens, kMask, v[c]);
  }
  for (int64_t c = steps * kLanes; c < columns; ++c) {
    for (int t = 0; t < kTileTokens; ++t) out[c * kTileTokens + t] = t < count ? x[t * x_stride + c] : 0.0f;
  }
}

template <int T>
static void float_panel_tile(const DotJob& job, const float* w, int64_t r0, int64_t r1, int64_t t0,
                             int64_t count) {
  const int64_t steps = job.columns / kLanes;
  const float* x = job.tokens.tiles + t0 * job.columns;
  PassTree<T, 4> tree;
  for (int pass = 0; pass < kFloatPasses; ++pass) {
    Vec sums[T][kPanelVecs];
    clear<T>(sums);
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
  Vec total[T][kPanelVecs];
  memcpy(total, tree.total(), sizeof total);
  for (int64_t c = steps * kLanes; c < job.columns; ++c, w += kPanelRows, x += kTileTokens) {
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < kPanelVecs; ++v)
        total[t][v] = add(total[t][v], mul(load(w + v * kLanes), splat(x[t])));
    }
  }
  store_sums(job, total[0], r0, r1, t0, count);
}

static void float_panel_dot(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
                            uint8_t*) {
  const float* w = reinterpret_cast<const float*>(panel);
  for (int64_t t = 0; t < tokens; t += kTileTokens) {
    const int64_t left = tokens - t;
    if (left > 8) {
      float_panel_tile<12>(job, w, r0, r1, t, left < kTileTokens ? left : kTileTokens);
    } else if (left > 4) {
      float_panel_tile<8>(job, w, r0, r1, t, left);
    } else {
      float_panel_tile<4>(job, w, r0, r1, t, left);
    }
  }
}
