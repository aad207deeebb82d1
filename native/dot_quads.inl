// Integer dot products, four blocks of 32 of four rows at a time.

static inline void quad_tokens(const int8_t* q, const float* d, const int16_t* sums, int64_t count,
                               QuadToken* out) {
  for (int64_t i = 0; i < count; ++i, q += kQuadColumns, d += 4, sums += 8, ++out) {
    for (int b = 0; b < 4; ++b) {
      memcpy(out->first + 16 * b, q + kBlock * b, 16);
      memcpy(out->second + 16 * b, q + kBlock * b + 16, 16);
      const int first = sums[2 * b], second = sums[2 * b + 1];
      for (int r = 0; r < 4; ++r) {
        out->d[4 * b + r] = d[b];
        out->sums[4 * b + r] = d[b] * static_cast<float>(first + second);
        out->eight[4 * b + r] = -8 * (first + second);
        out->minus[4 * b + r] = r == 0 ? -first : r == 1 ? -second : 0;
      }
    }
  }
}

// T tokens, of which one follows another after `stride`.
template <Format F, int v, int T>
[[gnu::always_inline]] static inline void add_vec(const uint8_t* const (&rows)[4], const QuadScales& scales,
                                                  const QuadToken* x, int64_t stride, int64_t b, int left,
                                                  Vec (&acc)[T][kQuadVecs]) {
  QuadProducts products[T][4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const Quad w = load_quad_of<F, v>(rows[r], b, left);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) products[t][r] = multiply_quad<F, v>(w, x[t * stride]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) acc[t][v] = add_quads<F, v>(products[t], scales, x[t * stride], acc[t][v]);
}

// Those of blocks b to b + 3.
template <Format F>
[[gnu::always_inline]] static inline QuadScales quad_scales(const uint8_t* const (&rows)[4], int64_t b,
                                                            int left) {
  if constexpr (is_k_quant(F)) {
    const uint8_t* p[4];
    for (int r = 0; r < 4; ++r) p[r] = part_at<F>(rows[r], b).block;
    return scales_of_half<F>(k_heads<F>(p), p, static_cast<int>(b / 4 & 1));
  } else {
    return load_scales<F>(rows, b, left);
  }
}

// Blocks b to b + 3.
template <Format F, int T>
[[gnu::always_inline]] static inline void add_four(const uint8_t* const (&rows)[4], const QuadScales& scales,
                                                   const QuadToken* x, int64_t stride, int64_t b, int left,
                                                   Vec (&acc)[T][kQuadVecs]) {
  add_vec<F, 0, T>(rows, scales, x, stride, b, left, acc);
  if constexpr (kQuadVecs > 1) add_vec<F, 1, T>(rows, scales, x, stride, b, left, acc);
}

// Quads of a row in a step: one, or a superblock's.
template <Format F>
constexpr int kStepQuads = is_k_quant(F) ? 2 : 1;

// From quad s on, of which `left` blocks are there.
template <Format F, int T>
[[gnu::always_inline]] static inline void int_step(const uint8_t* const (&rows)[4], const QuadToken* x,
                                                   int64_t stride, int64_t s, int left,
                                                   Vec (&acc)[T][kQuadVecs]) {
  const int64_t b = 4 * s;
  if constexpr (is_k_quant(F)) {
    const uint8_t* p[4];
    for (int r = 0; r < 4; ++r) p[r] = part_at<F>(rows[r], b).block;
    const KHeads heads = k_heads<F>(p);
    add_four<F, T>(rows, scales_of_half<F>(heads, p, 0), x + s, stride, b, left, acc);
    add_four<F, T>(rows, scales_of_half<F>(heads, p, 1), x + s + 1, stride, b + 4, left, acc);
  } else {
    add_four<F, T>(rows, load_scales<F>(rows, b, left), x + s, stride, b, left, acc);
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
  constexpr int kStep = kStepQuads<F>;
  constexpr int kStepBytes = kFormatInfo[F].block_bytes * kStep * kQuadColumns / kFormatInfo[F].block;
  const int64_t stride = tokens.q_stride / kQuadColumns, steps = n / (kStep * kQuadColumns);
  const QuadToken* x = tokens.quads + t0 * stride;
  for_steps<false, kStepBytes, 4>(next, 0, steps, [&](int64_t s) __attribute__((always_inline)) {
    int_step<F, T>(rows, x, stride, kStep * s, 4, acc);
  });
  if (const int left = static_cast<int>(n % kQuadColumns / kBlock))
    int_step<F, T>(rows, x, stride, kStep * steps, left, acc);
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
