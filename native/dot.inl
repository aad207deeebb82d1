// Dot products of rows and tokens: a tile of R rows by T tokens is kept in registers, so that each weight is
// read once for T tokens and each activation once for R rows.

template <Format F>
static inline Vec load_row(const uint8_t* row, int64_t c) {
  if constexpr (F == kF32) return load(row + 4 * c);
  if constexpr (F == kF16) return load_f16(row + 2 * c);
  if constexpr (F == kBF16) return load_bf16(row + 2 * c);
}

template <Format F>
static inline float load_one(const uint8_t* row, int64_t c) {
  if constexpr (F == kF32) return load_f32(row + 4 * c);
  if constexpr (F == kF16) return load_half(row + 2 * c);
  if constexpr (F == kBF16) return load_bfloat(row + 2 * c);
}

template <Format F, int R, int T>
static inline void float_tile(const RowTile<R>& tile, const float* x, int64_t x_stride, int64_t n,
                              float (&out)[T][R]) {
  Vec acc[T][R];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[t][r] = zero();
  }
  const auto add_vector = [&](int64_t c) __attribute__((always_inline)) {
    Vec xs[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) xs[t] = load(x + t * x_stride + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec w = load_row<F>(tile.now[r], c);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t][r] = fma(w, xs[t], acc[t][r]);
    }
  };
  // A cache line of halves.
  constexpr int kVecs = 32 / kLanes;
  for_steps<true, 32 * kFormatInfo[F].block_bytes, R>(tile.next, 0, n / 32,
                                                      [&](int64_t s) __attribute__((always_inline)) {
#pragma GCC unroll 8
                                                        for (int v = 0; v < kVecs; ++v)
                                                          add_vector(32 * s + v * kLanes);
                                                      });
  int64_t c = n / 32 * 32;
  for (; c + kLanes <= n; c += kLanes) add_vector(c);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    if constexpr (R == 4) {
      sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], out[t]);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) out[t][r] = sum(acc[t][r]);
    }
  }
  for (; c < n; ++c) {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) out[t][r] += load_one<F>(tile.now[r], c) * x[t * x_stride + c];
    }
  }
}

template <Format F, int R, int T>
static void dot_tile(const DotJob& job, const RowTile<R>& tile, int64_t r0, int64_t t0) {
  float sums[T][R];
  if constexpr (is_integer(F)) {
    int_tile<F, R, T>(tile, job.tokens, t0, job.columns, sums);
  } else {
    float_tile<F, R, T>(tile, job.tokens.x + t0 * job.tokens.x_stride, job.tokens.x_stride, job.columns,
                        sums);
  }
  for (int t = 0; t < T; ++t) {
    float* out = job.out + (t0 + t) * job.out_stride + r0;
    for (int r = 0; r < R; ++r) {
      const float value = job.bias ? sums[t][r] + job.bias[r0 + r] : sums[t][r];
      out[r] = job.add ? out[r] + value : value;
    }
  }
}

template <Format F, int R>
static inline void dot_rows(const DotJob& job, int64_t r, int64_t end, int64_t t0, int64_t t1) {
  constexpr int kTokens = is_integer(F) ? kIntTokens<F> : kFloatTokens;
  RowTile<R> tile;
  find_tile<R, kLongRows<F>>(job.rows, r, end, tile);
  if (kQuickRows<F> && job.rows.fetching == kToSecond) tile.next.second = true;
  const auto tokens = [&]<int T>(int64_t& t) __attribute__((always_inline)) {
    for (; t + T <= t1; t += T) {
      dot_tile<F, R, T>(job, tile, r, t);
      tile.next.what = Next::kNothing;  // all was fetched with the first tokens
    }
  };
  int64_t t = t0;
  tokens.template operator()<kTokens>(t);
  if constexpr (kTokens > 2) tokens.template operator()<2>(t);
  tokens.template operator()<1>(t);
}

// One token meets kFloatRows rows of floats at a time, for memory is read fastest in few streams; where they
// are fetched to the second cache one, if they are neighbours, or else four. A tile of integers is four.
template <Format F>
static void dot(const DotJob& job, int64_t r0, int64_t r1, int64_t t0, int64_t t1) {
  int64_t r = r0;
  if constexpr (!is_integer(F)) {
    const bool one = t1 - t0 == 1, second = job.rows.fetching == kToSecond;
    for (; one && second && !job.rows.ids && r < r1; ++r) dot_rows<F, 1>(job, r, r1, t0, t1);
    for (; one && !second && r + kFloatRows <= r1; r += kFloatRows)
      dot_rows<F, kFloatRows>(job, r, r1, t0, t1);
  }
  for (; r + kDotRows <= r1; r += kDotRows) dot_rows<F, kDotRows>(job, r, r1, t0, t1);
  for (; r < r1; ++r) dot_rows<F, 1>(job, r, r1, t0, t1);
}
