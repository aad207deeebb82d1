// Integer dot products, a block of 32 at a time: every lane sums its own elements.

constexpr auto quad_tokens = nullptr;

template <Format F, int R, int T>
static inline void int_tile(const RowTile<R>& tile, const Tokens& tokens, int64_t t0, int64_t n,
                            float (&out)[T][R]) {
  Vec acc[T][R];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[t][r] = zero();
  }
  constexpr int kStepBytes = kFormatInfo[F].block_bytes * kBlock / kFormatInfo[F].block;
  for_steps<false, kStepBytes, R>(tile.next, 0, n / kBlock, [&](int64_t b) __attribute__((always_inline)) {
    IntTokens xs[T];
    float sums[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const int64_t at = (t0 + t) * tokens.q_stride + b * kBlock;
      xs[t] = int_tokens(tokens.q + at, tokens.d + at / kBlock);
      const int16_t* halves = tokens.sums + at / 16;
      if (has_minima(F)) sums[t] = tokens.d[at / kBlock] * static_cast<float>(halves[0] + halves[1]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Part<F> part = part_at<F>(tile.now[r], b);
      const IntWeights w = int_weights<F>(part);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        acc[t][r] = fma(int_dot<F>(w, xs[t]), mul(w.d, xs[t].d), acc[t][r]);
        // A part of every lane: exact, for the number of lanes is a power of two.
        if (has_minima(F)) acc[t][r] = fma(w.least, splat(-sums[t] / kLanes), acc[t][r]);
      }
    }
  });
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    if constexpr (R == 4) {
      sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], out[t]);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) out[t][r] = sum(acc[t][r]);
    }
  }
}
