// Four blocks of four rows in two vectors of 256 bits, of two blocks each, and their products with tokens:
// what simd_avx512.h has in one vector. Sums of bytes are whole numbers, so that any way to take them gives
// the same; the float operations are those of AVX-512 in the same order.
//
// With THERMOCLINE_VNNI unsigned bytes are multiplied with signed ones and summed by fours in one
// instruction. Without, pairs are summed to 16 bits first: numbers of up to six bits do not saturate there,
// and the others take the sign from their factor.
#pragma once

#include "k_scales.h"
#include "kernels.h"
#include "simd_avx2.h"

namespace thermocline::THERMOCLINE_ISA {

#ifdef THERMOCLINE_VNNI
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

// What is added to numbers to make them unsigned; 0 where they are used with their sign.
template <Format F>
constexpr int kUnsigned = F == kQ8_0 ? (kVnni ? 128 : 0) : offset_of(F);

constexpr int kQuadVecs = 2;

typedef __m256i Int;
static inline Int load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
static inline void store_ints(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
static inline Int add_ints(Int a, Int b) { return _mm256_add_epi32(a, b); }
static inline Int zero_ints() { return _mm256_setzero_si256(); }
static inline Int splat_int(int a) { return _mm256_set1_epi32(a); }
static inline Int xor_ints(Int a, Int b) { return _mm256_xor_si256(a, b); }
static inline Int whole_numbers(Vec x) { return _mm256_cvtps_epi32(x); }
static inline Int low_nibbles(Int v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline Int high_nibbles(Int v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
// Within every 128 bits, as the instructions have it.
static inline Int low_bytes(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
static inline Int high_bytes(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
static inline Int low_words(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
static inline Int high_words(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
static inline Int turn_bytes(Int v) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(turn));
}
static inline Int narrow_ints(Int a, Int b) { return _mm256_packs_epi32(a, b); }
static inline Int narrow_words(Int a, Int b) { return _mm256_packs_epi16(a, b); }
template <int i>
static inline Int repeat_int(Int v) {
  return _mm256_shuffle_epi32(v, i * 0x55);
}
// One of the two lanes of 128 bits in place of both.
template <int second>
static inline Int repeat_lanes(Int v) {
  return _mm256_permute2x128_si256(v, v, second ? 0x11 : 0);
}

// Two blocks of a row: the first 16 numbers of each, and the second 16.
struct Quad {
  __m256i first, second;
};

static inline __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
static inline __m256i both(const uint8_t* p) { return _mm256_broadcastsi128_si256(load_128(p)); }

// Nibbles of bytes that two parts share: the low ones, then the high ones.
static inline __m256i low_then_high(const uint8_t* p) {
  return _mm256_and_si256(_mm256_srlv_epi64(both(p), _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}

// Sixteen where a bit is set: in the first half bit `at`, in the second the next one.
static inline __m256i sixteens(const uint8_t* p, int at) {
  const __m256i bits = _mm256_srlv_epi64(both(p), _mm256_setr_epi64x(at, at, at + 1, at + 1));
  return _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi8(1)), 4);
}

// Blocks b + 2 v and b + 2 v + 1 of a row that has `left` blocks from b on, whose last one is read again in
// place of those past it.
template <Format F, int v>
[[gnu::always_inline]] static inline Quad load_quad_of(const uint8_t* row, int64_t b, int left) {
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  if constexpr (is_in_halves(F) && F != kQ4_0) {
    const __m256i bytes = load_256(numbers_at(part_at<F>(row, b + 2 * v))), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
  } else if constexpr (!is_k_quant(F)) {
    const uint8_t* p = row + (b + block_in(2 * v, left)) * kBytes + 2;
    const uint8_t* q = row + (b + block_in(2 * v + 1, left)) * kBytes + 2;
    const __m256i low = join(load_128(p), load_128(q));
    if constexpr (F == kQ8_0) {
      const __m256i high = join(load_128(p + 16), load_128(q + 16));
      const __m256i sign = _mm256_set1_epi8(static_cast<char>(kUnsigned<F>));
      return {_mm256_xor_si256(low, sign), _mm256_xor_si256(high, sign)};
    } else {
      const __m256i mask = _mm256_set1_epi8(15);
      return {_mm256_and_si256(low, mask), _mm256_and_si256(_mm256_srli_epi16(low, 4), mask)};
    }
  } else {
    (void)left;
    const uint8_t* block = row + b / 8 * kBytes;
    const int half = static_cast<int>(b / 4 & 1);
    if constexpr (F == kQ5_Kx8) {
      const __m256i low = load_256(block + 48 + half * 64 + 32 * v), two = load_256(block + 16);
      const __m256i nibble = _mm256_set1_epi8(15), sixteen = _mm256_set1_epi8(16);
      const auto bit = [&](int at) __attribute__((always_inline)) {
        return _mm256_and_si256(at < 4 ? _mm256_slli_epi16(two, 4 - at) : _mm256_srli_epi16(two, at - 4),
                                sixteen);
      };
      const int at = 4 * half + 2 * v;
      return {_mm256_or_si256(_mm256_and_si256(low, nibble), bit(at)),
              _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 4), nibble), bit(at + 1))};
    } else if constexpr (F == kQ6_Kx8) {
      const __m256i low = load_256(block + half * 64 + 32 * v), two = load_256(block + 128 + 32 * v);
      const __m256i nibble = _mm256_set1_epi8(15), high = _mm256_set1_epi8(0x30);
      const __m256i first = half ? two : _mm256_slli_epi16(two, 4);
      const __m256i second = half ? _mm256_srli_epi16(two, 2) : _mm256_slli_epi16(two, 2);
      return {_mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(first, high)),
              _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 4), nibble),
                              _mm256_and_si256(second, high))};
    } else if constexpr (F == kQ6_K) {
      const uint8_t *low = block + half * 64, *two = block + 128 + half * 32;
      const __m256i four = _mm256_set1_epi8(15), high = _mm256_set1_epi8(0x30);
      const auto numbers_at = [&](int i) __attribute__((always_inline)) {
        const __m256i nibbles = _mm256_srli_epi16(join(load_128(low + i), load_128(low + 32 + i)), 4 * v);
        const __m256i bits = v ? _mm256_srlv_epi64(both(two + i), _mm256_setr_epi64x(0, 0, 2, 2))
                               : _mm256_sllv_epi64(both(two + i), _mm256_setr_epi64x(4, 4, 2, 2));
        return _mm256_or_si256(_mm256_and_si256(nibbles, four), _mm256_and_si256(bits, high));
      };
      return {numbers_at(0), numbers_at(16)};
    } else {
      const uint8_t* p = block + (F == kQ4_K ? 16 : 48) + half * 64 + v * 32;
      Quad quad{low_then_high(p), low_then_high(p + 16)};
      if constexpr (F == kQ5_K) {
        quad.first = _mm256_or_si256(quad.first, sixteens(block + 16, 4 * half + 2 * v));
        quad.second = _mm256_or_si256(quad.second, sixteens(block + 32, 4 * half + 2 * v));
      }
      return quad;
    }
  }
}

// The bytes of blocks b + 2 v and b + 2 v + 1 of a row, of a format of nibbles, in the order of the file.
template <Format F, int v>
[[gnu::always_inline]] static inline __m256i load_bytes(const uint8_t* row, int64_t b, int left) {
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  if constexpr (F == kQ4_0) {
    const auto at = [&](int i) { return row + (b + block_in(i, left)) * kBytes + 2; };
    return join(load_128(at(2 * v)), load_128(at(2 * v + 1)));
  } else if constexpr (is_in_halves(F)) {
    return load_256(numbers_at(part_at<F>(row, b + 2 * v)));
  } else {
    return load_256(row + b / 8 * kBytes + 16 + b / 4 % 2 * 64 + v * 32);
  }
}

// Scales of four blocks of four rows, in lanes block by block: of all numbers of a block or, in Q6_K, of the
// first 16 and the second 16; and the minima.
struct QuadScales {
  Vec first[kQuadVecs], second[kQuadVecs], least[kQuadVecs];
};

static inline Vec spread_rows(__m128 rows) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(rows), rows, 1);
}

[[gnu::always_inline]] static inline void floats_of_scales(__m128i bytes, __m128 d, Vec (&to)[kQuadVecs]) {
  const Vec rows = spread_rows(d);
  to[0] = mul(rows, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
  to[1] = mul(rows, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))));
}

// Of the first or the second four parts of a superblock, which begins at p[r] in row r.
template <Format F>
[[gnu::always_inline]] static inline QuadScales scales_of_half(const KHeads& heads,
                                                               const uint8_t* const (&p)[4], int half) {
  const KScales k = k_scales<F>(heads, p, half);
  QuadScales scales{};
  floats_of_scales(k.first, heads.d, scales.first);
  if constexpr (is_q6_k(F)) floats_of_scales(k.second, heads.d, scales.second);
  if constexpr (has_minima(F)) floats_of_scales(k.least, heads.d_least, scales.least);
  return scales;
}

template <Format F>
[[gnu::always_inline]] static inline QuadScales load_scales(const uint8_t* const (&rows)[4], int64_t b,
                                                            int left) {
  QuadScales scales{};
  if constexpr (has_scales_apart(F)) {
    const uint8_t* p[4];
    for (int r = 0; r < 4; ++r) p[r] = scale_at(part_at<F>(rows[r], b));
    const __m256i words = turn_scales(p);
    scales.first[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    scales.first[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
    return scales;
  }
#pragma GCC unroll 2
  for (int v = 0; v < kQuadVecs; ++v) {
    // The first word of two blocks of each row.
    const auto at = [&](int i) { return (b + block_in(2 * v + i, left)) * kFormatInfo[F].block_bytes; };
    const auto word = [&](int i, int r) { return load_u16(rows[r] + at(i)); };
    __m128i words = _mm_cvtsi32_si128(load_int(rows[0] + at(0)));
    words = _mm_insert_epi16(words, word(0, 1), 1);
    words = _mm_insert_epi16(words, word(0, 2), 2);
    words = _mm_insert_epi16(words, word(0, 3), 3);
    words = _mm_insert_epi16(words, word(1, 0), 4);
    words = _mm_insert_epi16(words, word(1, 1), 5);
    words = _mm_insert_epi16(words, word(1, 2), 6);
    words = _mm_insert_epi16(words, word(1, 3), 7);
    scales.first[v] = _mm256_cvtph_ps(words);
  }
  return scales;
}

// Sums of four neighbouring products each, of 16 numbers of two blocks.
#ifdef THERMOCLINE_VNNI
template <Format F>
static inline __m256i sums_of(__m256i w, __m256i x, __m256i before) {
  return _mm256_dpbusd_avx_epi32(before, w, x);
}
#endif

template <Format F>
static inline __m256i pairs_of(__m256i w, __m256i x) {
  return F == kQ8_0 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                    : _mm256_maddubs_epi16(w, x);
}
static inline __m256i sums_of_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// What Q vectors of numbers and digits add to sums of four neighbouring products: pairs of two vectors fit 16
// bits together, but those of whole bytes.
template <Format F, int Q>
static inline Int add_products(Int before, const Int (&numbers)[Q], const Int (&digits)[Q]) {
#ifdef THERMOCLINE_VNNI
#pragma GCC unroll 2
  for (int g = 0; g < Q; ++g) before = sums_of<F>(numbers[g], digits[g], before);
  return before;
#else
  static_assert(Q == 1 || Q == 2);
  const Int pairs = pairs_of<F>(numbers[0], digits[0]);
  if constexpr (Q == 1) return add_ints(before, sums_of_pairs(pairs));
  const Int more = pairs_of<F>(numbers[Q - 1], digits[Q - 1]);
  if constexpr (F == kQ8_0) return add_ints(add_ints(before, sums_of_pairs(pairs)), sums_of_pairs(more));
  return add_ints(before, sums_of_pairs(_mm256_add_epi16(pairs, more)));
#endif
}

// Of one row with one token: sums of neighbouring products, of both halves of the blocks or, in Q6_K, of each
// half. Sums of pairs are added where they fit 16 bits.
struct QuadProducts {
  Int first, second;
};

template <Format F, int v>
[[gnu::always_inline]] static inline QuadProducts multiply_quad(const Quad& w, const QuadToken& x) {
  const Int first = load_256(x.first + 32 * v), second = load_256(x.second + 32 * v);
#ifdef THERMOCLINE_VNNI
  const Int sums = sums_of<F>(w.first, first, _mm256_setzero_si256());
  if constexpr (is_q6_k(F)) return {sums, sums_of<F>(w.second, second, _mm256_setzero_si256())};
  return {sums_of<F>(w.second, second, sums), zero_ints()};
#else
  const Int one = pairs_of<F>(w.first, first), two = pairs_of<F>(w.second, second);
  if constexpr (is_q6_k(F)) return {one, two};
  if constexpr (F == kQ8_0) return {_mm256_add_epi32(sums_of_pairs(one), sums_of_pairs(two)), zero_ints()};
  return {_mm256_add_epi16(one, two), zero_ints()};
#endif
}

// Pairs of neighbours of a and of b are added: sums over 64 bits, of a and of b by turns.
static inline Int sum_twos(Int a, Int b) {
  return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}
static inline Int sum_wholes(Int ab, Int cd) {
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
static inline Int sum_two_pairs(Int a, Int b) {
  return _mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}
static inline Int sum_whole_pairs(Int ab, Int cd) {
  return _mm256_add_epi16(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

// Sums over 128 bits of what products a, b, c and d hold, which become four neighbours.
template <Format F>
static inline Int sum_fours(Int a, Int b, Int c, Int d) {
  if constexpr (kVnni || F == kQ8_0) {
    return sum_wholes(sum_twos(a, b), sum_twos(c, d));
  } else if constexpr (is_q5_k(F) || is_q6_k(F)) {
    return sum_wholes(sums_of_pairs(sum_two_pairs(a, b)), sums_of_pairs(sum_two_pairs(c, d)));
  } else {
    return sums_of_pairs(sum_whole_pairs(sum_two_pairs(a, b), sum_two_pairs(c, d)));
  }
}

// What two blocks of four rows add to the sums: block i of row r to lane 4 i + r.
template <Format F, int v>
[[gnu::always_inline]] static inline Vec add_quads(const QuadProducts (&p)[4], const QuadScales& scales,
                                                   const QuadToken& x, Vec acc) {
  const Vec d = load(x.d + kLanes * v);
  Int all = sum_fours<F>(p[0].first, p[1].first, p[2].first, p[3].first);
  if constexpr (has_minima(F)) {
    acc = fma(_mm256_cvtepi32_ps(all), mul(scales.first[v], d), acc);
    return _mm256_fnmadd_ps(scales.least[v], load(x.sums + kLanes * v), acc);
  } else if constexpr (kUnsigned<F> == 0) {
    return fma(_mm256_cvtepi32_ps(all), mul(scales.first[v], d), acc);
  } else {
    if constexpr (is_q6_k(F)) {
      const Int minus = load_ints(x.minus + kLanes * v);
      const Int two = sum_fours<F>(p[0].second, p[1].second, p[2].second, p[3].second);
      all = add_ints(all, _mm256_slli_epi32(repeat_int<0>(minus), 5));
      acc = fma(_mm256_cvtepi32_ps(all), mul(scales.first[v], d), acc);
      all = add_ints(two, _mm256_slli_epi32(repeat_int<1>(minus), 5));
      return fma(_mm256_cvtepi32_ps(all), mul(scales.second[v], d), acc);
    } else {
      constexpr int kTimes = kUnsigned<F> == 128 ? 4 : 0;
      const Int lift = _mm256_slli_epi32(load_ints(x.eight + kLanes * v), kTimes);
      return fma(_mm256_cvtepi32_ps(add_ints(all, lift)), mul(scales.first[v], d), acc);
    }
  }
}

// The sums of four rows: blocks 0, 4, 8 ... of a row are one sum, 1, 5, 9 ... the next.
static inline __m128 sum_blocks(const Vec (&acc)[kQuadVecs]) {
  return _mm_add_ps(fold(acc[0]), fold(acc[1]));
}

}  // namespace thermocline::THERMOCLINE_ISA
