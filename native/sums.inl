// Weighted sums of rows of an integer format, in integers: the down projection over neuron records.
//
// The factor of a neuron times the scale of a block is rounded to a whole number in a unit that all rows of a
// token share, whose digits are multiplied with the stored numbers as signed bytes, four rows at once. The
// sums are exact, so that they depend neither on the order of the rows, nor on which of them share a call,
// nor on the level.

// Whether bytes are taken as they lie in the file, where the low nibbles belong to one block and the high
// ones to the next.
template <Format F>
constexpr bool kFileOrder = F == kQ4_K;

// Whether rows are turned as bytes, which hold a number in each of their nibbles.
template <Format F>
constexpr bool kNibbles = is_q4_0(F) || is_q4_k(F);

// Whether the second half is whole bytes, of which the sums of the low nibbles are taken off at the end.
template <Format F>
constexpr bool kWholeBytes = is_q4_0(F) && kVnni;

// Numbers of four rows, those of one column together. A vector has 16 bytes of each of its blocks; `second`
// is the rest of these blocks, which formats of nibbles have in the same bytes.
struct Turned {
  Int first[4], second[4];
};

static inline void turn(const Int (&rows)[4], Int (&columns)[4]) {
  const Int ab = low_bytes(rows[0], rows[1]), cd = low_bytes(rows[2], rows[3]);
  const Int ef = high_bytes(rows[0], rows[1]), gh = high_bytes(rows[2], rows[3]);
  columns[0] = low_words(ab, cd);
  columns[1] = high_words(ab, cd);
  columns[2] = low_words(ef, gh);
  columns[3] = high_words(ef, gh);
}

template <Format F, int v>
[[gnu::always_inline]] static inline void turn_rows(const uint8_t* const* rows, int64_t b, int left,
                                                    Turned& to) {
  Int first[4], second[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    if constexpr (kNibbles<F>) {
      first[r] = load_bytes<F, v>(rows[r], b, left);
    } else {
      const Quad quad = load_quad_of<F, v>(rows[r], b, left);
      first[r] = quad.first;
      second[r] = quad.second;
    }
  }
  turn(first, to.first);
  if constexpr (!kNibbles<F>) turn(second, to.second);
}

template <Format F, int half>
static inline Int half_of(const Turned& w, int j) {
  if constexpr (!kNibbles<F>) return half ? w.second[j] : w.first[j];
  if constexpr (half == 0) return low_nibbles(w.first[j]);
  return kWholeBytes<F> ? w.first[j] : high_nibbles(w.first[j]);
}

// Where numbers take their sign from the digit, this must have the opposite number: -128 is none then.
template <Format F>
constexpr int kDigitBase = F == kQ8_0 && !kVnni ? 254 : 256;

// The digits of whole numbers, place 4 * i + r of which belongs to row r and block i: byte 4 * d + r of the
// 128 bits of a block is digit d, the lowest first, of row r.
template <Format F>
[[gnu::always_inline]] static inline Int digits_of(Vec factor) {
  if constexpr (kDigitBase<F> == 256) {
    // With 128 added to every digit none is negative, and the bytes are the digits.
    const Int middle = splat_int(0x808080);
    return turn_bytes(xor_ints(add_ints(whole_numbers(factor), middle), middle));
  } else {
    Int digits[kDigits];
    Vec left = nearest(factor);
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; ++d) {
      const Vec above = nearest(mul(left, splat(1.0f / kDigitBase<F>)));
      digits[d] = whole_numbers(fma(above, splat(-kDigitBase<F>), left));
      left = above;
    }
    return narrow_words(narrow_ints(digits[0], digits[1]), narrow_ints(digits[2], digits[2]));
  }
}

// The digits of the factors of four blocks of four rows: of all numbers or, in Q6_K, of the first 16 and the
// second 16 of a block; and of what a minimum takes off.
struct WholeFactors {
  Int of[2][kQuadVecs], least[kQuadVecs];
};

template <Format F>
[[gnu::always_inline]] static inline WholeFactors whole_factors(const uint8_t* const* rows, int64_t b,
                                                                int left, Vec factor, Vec least) {
  const uint8_t* const four[4] = {rows[0], rows[1], rows[2], rows[3]};
  const QuadScales scales = quad_scales<F>(four, b, left);
  WholeFactors whole;
#pragma GCC unroll 2
  for (int v = 0; v < kQuadVecs; ++v) {
    whole.of[0][v] = digits_of<F>(mul(scales.first[v], factor));
    if constexpr (is_q6_k(F)) whole.of[1][v] = digits_of<F>(mul(scales.second[v], factor));
    if constexpr (has_minima(F)) whole.least[v] = digits_of<F>(mul(scales.least[v], least));
  }
  return whole;
}

// One digit of four rows, in every 128 bits again and again that of the block which lies there.
template <Format F, int half, int d>
[[gnu::always_inline]] static inline Int spread_digit(Int digits) {
  const Int spread = repeat_int<d>(digits);
  if constexpr (kFileOrder<F>) return repeat_lanes<half>(spread);
  return spread;
}

// One half of a vector's columns, of Q quads of rows.
template <Format F, int half, int Q>
[[gnu::always_inline]] static inline void add_half(const Turned (&w)[Q], const WholeFactors (&whole)[Q],
                                                   int v, SumStep* to) {
  static_assert(kDigits == 3);
  Int digits[kDigits][Q];
#pragma GCC unroll 2
  for (int g = 0; g < Q; ++g) {
    const Int all = whole[g].of[is_q6_k(F) ? half : 0][v];
    digits[0][g] = spread_digit<F, half, 0>(all);
    digits[1][g] = spread_digit<F, half, 1>(all);
    digits[2][g] = spread_digit<F, half, 2>(all);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Int numbers[Q];
#pragma GCC unroll 2
    for (int g = 0; g < Q; ++g) numbers[g] = half_of<F, half>(w[g], j);
#pragma GCC unroll 4
    for (int d = 0; d < kDigits; ++d) {
      int32_t* place = to->at[d] + (half * 4 + j) * 16 + v * kLanes;
      store_ints(place, add_products<F>(load_ints(place), numbers, digits[d]));
    }
  }
}

// The digits of the factors themselves, for what is stored with an offset or lifted by a minimum.
template <Format F, int Q>
[[gnu::always_inline]] static inline void add_factors(const WholeFactors (&whole)[Q], int v, SumStep* to) {
  const auto add = [&](int32_t* place, Int digits) __attribute__((always_inline)) {
    const Int ones[1] = {splat_int(0x01010101)}, of[1] = {digits};
    store_ints(place, add_products<kQ4_0>(load_ints(place), ones, of));
  };
#pragma GCC unroll 2
  for (int g = 0; g < Q; ++g) {
    if constexpr (kUnsigned<F> != 0) add(to->factors[0] + v * kLanes, whole[g].of[0][v]);
    if constexpr (is_q6_k(F)) add(to->factors[1] + v * kLanes, whole[g].of[1][v]);
    if constexpr (has_minima(F)) add(to->least + v * kLanes, whole[g].least[v]);
  }
}

template <Format F, int Q, int v>
[[gnu::always_inline]] static inline void add_sum_vec(const uint8_t* const* rows, int64_t b, int left,
                                                      const WholeFactors (&whole)[Q], SumStep* to) {
  Turned w[Q];
#pragma GCC unroll 2
  for (int g = 0; g < Q; ++g) turn_rows<F, v>(rows + 4 * g, b, left, w[g]);
  add_half<F, 0, Q>(w, whole, v, to);
  add_half<F, 1, Q>(w, whole, v, to);
  add_factors<F, Q>(whole, v, to);
}

// Those of four rows, 0 from `end` on. They stay in registers, for a vector that is read where its numbers
// were stored one by one waits until all stores before have reached the cache.
static inline __m256d four_weights(const SumJob& job, int64_t k, int64_t end) {
  const auto weight = [&](int i) { return k + i < end ? weight_of(job, k + i) : 0.0; };
  return _mm256_setr_pd(weight(0), weight(1), weight(2), weight(3));
}

static inline __m128 factors_of(__m256d weights, double per_unit) {
  const __m256d most = _mm256_set1_pd(kMostFactor), least = _mm256_set1_pd(-kMostFactor);
  return _mm256_cvtpd_ps(
      _mm256_max_pd(least, _mm256_min_pd(most, _mm256_mul_pd(weights, _mm256_set1_pd(per_unit)))));
}

// Q quads of rows: those in places k to end, of which there are fewer if the last quad is not full.
template <Format F, int Q>
static void add_sum_tile(const SumJob& job, int64_t k, int64_t end, int64_t limit, int64_t c0, int64_t c1) {
  RowTile<4 * Q> tile;
  find_sums(job, k, end, limit, tile);
  Vec factor[Q], least[Q];
#pragma GCC unroll 2
  for (int g = 0; g < Q; ++g) {
    const __m256d weights = four_weights(job, k + 4 * g, end);
    factor[g] = spread_rows(factors_of(weights, job.per_factor));
    least[g] = spread_rows(factors_of(weights, job.per_least));
  }
  const int64_t first = c0 / kBlock, blocks = (c1 - c0) / kBlock;
  const auto step = [&](int64_t s, int left) __attribute__((always_inline)) {
    const int64_t b = first + 4 * s;
    WholeFactors whole[Q];
#pragma GCC unroll 2
    for (int g = 0; g < Q; ++g) whole[g] = whole_factors<F>(tile.now + 4 * g, b, left, factor[g], least[g]);
    add_sum_vec<F, Q, 0>(tile.now, b, left, whole, job.sums + s);
    if constexpr (kQuadVecs > 1) add_sum_vec<F, Q, 1>(tile.now, b, left, whole, job.sums + s);
  };
  constexpr int kStepBytes = kSumColumns * kFormatInfo[F].block_bytes / kFormatInfo[F].block;
  for_steps<false, kStepBytes, 4 * Q>(tile.next, bytes_of<F>(c0), blocks / 4,
                                      [&](int64_t s) __attribute__((always_inline)) { step(s, 4); });
  if (blocks % 4) step(blocks / 4, static_cast<int>(blocks % 4));
}

template <Format F>
static void add_sums(const SumJob& job, int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
  const int64_t limit = job.list || job.rows.count < k1 ? k1 : job.rows.count;
  int64_t k = k0;
  for (; k + 8 <= k1; k += 8) add_sum_tile<F, 2>(job, k, k + 8, limit, c0, c1);
  for (; k < k1; k += 4) add_sum_tile<F, 1>(job, k, k + 4 < k1 ? k + 4 : k1, limit, c0, c1);
}
