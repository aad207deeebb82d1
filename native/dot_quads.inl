// Integer dot products, four blocks of 32 of four rows at a time.

template <Format F, int v, int T>
[[gnu::always_inline]] static inline void add_vec(const uint8_t* const (&rows)[4], const QuadScales& scales,
                                                  const Tokens& tokens, int64_t t0, int64_t b, int64_t last,
                                                  Vec (&acc)[T][kQuadVecs]) {
  Quad w[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) w[r] = load_quad_of<F, v>(rows[r], b, last);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    acc[t][v] = add_quads<F>(w, scales, v, load_tokens<F, v>(tokens, t0 + t, b), acc[t][v]);
  }
}

// Those of blocks b to b + 3.
template <Format F>
[[gnu::always_inline]] static inline QuadScales quad_scales(const uint8_t* const (&rows)[4], int64_t b,
                                                            int64_t last) {
  if constexpr (is_k_quant(F)) {
    const uint8_t* p[4];
    for (int r = 0; r < 4; ++r) p[r] = part_at<F>(rows[r], b).block;
    return scales_of_half<F>(k_heads<F>(p), p, static_cast<int>(b / 4 % 2));
  } else {
    return load_scales<F>(rows, b, last);
  }
}

// Blocks b to b + 3.
template <Format F, int T>
[[gnu::always_inline]] static inline void add_four(const uint8_t* const (&rows)[4], const QuadScales& scales,
                                                   const Tokens& tokens, int64_t t0, int64_t b, int64_t last,
                                                   Vec (&acc)[T][kQuadVecs]) {
  add_vec<F, 0, T>(rows, scales, tokens, t0, b, last, acc);
  if constexpr (kQuadVecs > 1) add_vec<F, 1, T>(rows, scales, tokens, t0, b, last, acc);
}

// Blocks of a row in a step: four, or a superblock.
template <Format F>
constexpr int kStepBlocks = is_k_quant(F) ? 8 : 4;

template <Format F, int T>
[[gnu::always_inline]] static inline void int_step(const uint8_t* const (&rows)[4], const Tokens& tokens,
                                                   int64_t t0, int64_t b, int64_t last,
                                                   Vec (&acc)[T][kQuadVecs]) {
  if constexpr (is_k_quant(F)) {
    const uint8_t* p[4];
    for (int r = 0; r < 4; ++r) p[r] = part_at<F>(rows[r], b).block;
    const KHeads heads = k_heads<F>(p);
    add_four<F, T>(rows, scales_of_half<F>(heads, p, 0), tokens, t0, b, last, acc);
    add_four<F, T>(rows, scales_of_half<F>(heads, p, 1), tokens, t0, b + 4, last, acc);
  } else {
    add_four<F, T>(rows, load_scales<F>(rows, b, last), tokens, t0, b, last, acc);
  }
}

template <Format F, int T>
[[gnu::always_inline]] static inline void int_quad(const uint8_t* const (&rows)[4], const NextRows& next,
                                                   const Tokens& tokens, int64_t t0, int64_t n,
                                                   float (&out)[T][4]) {
  Vec acc[T][kQuadVecs];
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < kQuadVecs; ++v) acc[t][v] = zero();
  }
  const int64_t blocks = n / kBlock;
  constexpr int kBlocks = kStepBlocks<F>;
  constexpr int kStepBytes = kFormatInfo[F].block_bytes * kBlocks * kBlock / kFormatInfo[F].block;
  // Where the last block is surely no nearer than the fourth, the compiler sees that none is clamped.
  for_steps<false, kStepBytes, 4>(next, 0, blocks / kBlocks, [&](int64_t s) __attribute__((always_inline)) {
    const int64_t b = kBlocks * s;
    int_step<F, T>(rows, tokens, t0, b, b + (kBlocks - 1), acc);
  });
  if (blocks % kBlocks) int_step<F, T>(rows, tokens, t0, blocks / 4 * 4, blocks - 1, acc);
  for (int t = 0; t < T; ++t) _mm_storeu_ps(out[t], sum_blocks(acc[t]));
}

template <Format F, int R, int T>
[[gnu::always_inline]] static inline void int_tile(const RowTile<R>& tile, const Tokens& tokens, int64_t t0,
                                                   int64_t n, float (&out)[T][R]) {
  if constexpr (R == 4) {
    int_quad<F, T>(tile.now, tile.next, tokens, t0, n, out);
  } else {
    static_assert(R == 1);
    const uint8_t* const rows[4] = {tile.now[0], tile.now[0], tile.now[0], tile.now[0]};
    float four[T][4];
    int_quad<F, T>(rows, tile.next, tokens, t0, n, four);
    for (int t = 0; t < T; ++t) out[t][0] = four[t][0];
  }
}
