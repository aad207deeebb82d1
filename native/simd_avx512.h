// Sixteen float lanes: AVX-512 F, BW, VL, DQ and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "format.h"
#include "half.h"
#include "k_scales.h"
#include "kernels.h"
#include "numbers_256.h"

namespace thermocline::THERMOCLINE_ISA {

typedef __m512 Vec;
constexpr int kLanes = 16;
// 4 x 6 accumulators, 6 tokens and a row take 31 of the 32 registers; integer tokens need three registers
// each.
constexpr int kDotRows = 4;
constexpr int kFloatRows = 2;
constexpr int kFloatTokens = 6;
template <Format>
constexpr int kIntTokens = 4;
constexpr int kIntPanelTokens = 16;
template <Format F>
constexpr int kFloatPanelTokens = F == kF32 ? 32 : 96;
constexpr int kAxpyRows = 4;

static inline Vec splat(float a) { return _mm512_set1_ps(a); }
static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec load(const void* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
// One lane of fma().
static inline float fma_one(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// Both return b where either is NaN.
static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec keep_above(Vec x, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), x);
}
// gate * x, 0 where the gate is.
static inline Vec gated(Vec gate, Vec x) {
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_NEQ_UQ), gate, x);
}
static inline Vec gather(const float* x, const int32_t* places) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(places), x, sizeof(float));
}
// v, 0 where x < limit.
static inline Vec keep_from(Vec v, Vec x, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}

static inline uint32_t at_least(Vec a, Vec limit) { return _mm512_cmp_ps_mask(a, limit, _CMP_GE_OQ); }
// In a register first: compressing to memory is slow on some CPUs.
static inline int list_bits(uint32_t bits, int32_t base, int32_t* out) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(base));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), ids));
  return __builtin_popcount(bits);
}

static inline __m128 fold(Vec v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline float sum(Vec v) {
  const __m128 pair = _mm_hadd_ps(fold(v), fold(v));
  return _mm_cvtss_f32(_mm_hadd_ps(pair, pair));
}
static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
}
static inline float largest(Vec v) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline Vec nearest(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2^n for whole n.
static inline Vec times_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

static inline Vec load_f16(const uint8_t* p) { return _mm512_cvtph_ps(load_256(p)); }
static inline Vec load_bf16(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
}
static inline void store_f16(uint8_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

typedef __m512i Int;
constexpr bool kVnni = true;
static inline Int load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline void store_ints(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
static inline Int add_ints(Int a, Int b) { return _mm512_add_epi32(a, b); }
static inline Int splat_int(int a) { return _mm512_set1_epi32(a); }
static inline Int xor_ints(Int a, Int b) { return _mm512_xor_si512(a, b); }
static inline Int whole_numbers(Vec x) { return _mm512_cvtps_epi32(x); }
static inline Int low_nibbles(Int v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
static inline Int high_nibbles(Int v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
// Within every 128 bits, as the instructions have it.
static inline Int low_bytes(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
static inline Int high_bytes(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
static inline Int low_words(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
static inline Int high_words(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
static inline Int turn_bytes(Int v) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(turn));
}
static inline Int narrow_ints(Int a, Int b) { return _mm512_packs_epi32(a, b); }
static inline Int narrow_words(Int a, Int b) { return _mm512_packs_epi16(a, b); }
template <int i>
static inline Int repeat_int(Int v) {
  return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(i * 0x55));
}
// The first lane of 128 bits of each two in place of both, or the second.
template <int second>
static inline Int repeat_lanes(Int v) {
  return _mm512_shuffle_i32x4(v, v, second ? 0xF5 : 0xA0);
}
// What Q vectors of numbers and digits add to sums of four neighbouring products.
template <Format, int Q>
static inline Int add_products(Int before, const Int (&numbers)[Q], const Int (&digits)[Q]) {
#pragma GCC unroll 2
  for (int g = 0; g < Q; ++g) before = _mm512_dpbusd_epi32(before, numbers[g], digits[g]);
  return before;
}

static inline float scale_of(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

// 32 rounded values of x * inverse as bytes, and the sums of both halves.
static inline void pack_block(const float* x, float inverse, int8_t* q, int16_t* sums) {
  const Vec scale = splat(inverse);
  const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(load(x), scale)));
  const __m128i high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(load(x + 16), scale)));
  const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
  const __m256i two = _mm256_hadd_epi32(fours, fours), one = _mm256_hadd_epi32(two, two);
  sums[0] = static_cast<int16_t>(_mm256_extract_epi32(one, 0));
  sums[1] = static_cast<int16_t>(_mm256_extract_epi32(one, 4));
}

// Four blocks of a row, b to b + 3, at once: a vector holds the first 16 numbers of each, another one the
// second 16. VNNI multiplies unsigned by signed bytes, so numbers are read with an offset that makes them
// unsigned (as Q4_0 and Q6_K are stored); the offset times the sum of the activations is taken off the sums.
constexpr int kQuadVecs = 1;
struct Quad {
  __m512i first, second;
};

template <Format F>
constexpr int kUnsigned = F == kQ8_0 ? 128 : offset_of(F);

static inline __m512i load_quad(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  __m512i v = _mm512_castsi128_si512(load_128(a));
  v = _mm512_inserti32x4(v, load_128(b), 1);
  v = _mm512_inserti32x4(v, load_128(c), 2);
  return _mm512_inserti32x4(v, load_128(d), 3);
}

// Lanes of 128 bits of v, in the order that `kLanesOf` names, each shifted right by its number of bits.
template <int kOrder>
static inline __m512i nibble_lanes(__m512i v, __m512i shifts) {
  const __m512i moved = _mm512_shuffle_i32x4(v, v, kOrder);
  return _mm512_and_si512(_mm512_srlv_epi64(moved, shifts), _mm512_set1_epi8(15));
}

// 64 bytes in a register, for uses that would each read them again. (Not of whole bytes, whose arithmetic
// then outpaces memory: lines on their way fill the first cache's queue, and decoding loses up to a fifth.)
static inline __m512i held(const uint8_t* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("" : "+v"(v));
  return v;
}

// Where words kFirst ... kFirst + 7 of each of four blocks of kStride words lie in two pieces of 64 bytes,
// which begin at words 0 and kSecond.
template <int kStride, int kFirst, int kSecond>
struct Places {
  alignas(64) int16_t at[32];
  constexpr Places() : at{} {
    for (int i = 0; i < 32; ++i) {
      const int word = i / 8 * kStride + kFirst + i % 8;
      at[i] = static_cast<int16_t>(word < 32 ? word : 32 + word - kSecond);
    }
  }
};

// Words kFirst, kFirst + 1 ... kFirst + 7 of each of four blocks of kStride words, in lanes of 128 bits.
template <int kStride, int kFirst>
[[gnu::always_inline]] static inline __m512i pick_words(const uint8_t* p) {
  constexpr int kLast = 3 * kStride + kFirst;
  if constexpr (kStride < 16) {
    // Loads that cross cache lines are what takes longest: that of p serves all but the end of the last lane.
    static constexpr Places<kStride, kFirst, 0> kPlaces;
    const __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(&kPlaces), held(p));
    return _mm512_mask_broadcast_i32x4(words, 0xF000, load_128(p + 2 * kLast));
  } else {
    // They lie in less than 128 bytes: the second load ends where the last word does.
    static constexpr Places<kStride, 0, kLast + 8 - 32 - kFirst> kPlaces;
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(p + 2 * kFirst), _mm512_load_si512(&kPlaces),
                                     _mm512_loadu_si512(p + 2 * (kLast + 8 - 32)));
  }
}

// Blocks b to b + 3 of a row that has `left` from b on, whose last one is read again in place of those past
// it.
template <Format F, int>
[[gnu::always_inline]] static inline Quad load_quad_of(const uint8_t* row, int64_t b, int left) {
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  if constexpr (is_in_halves(F) && F != kQ4_0) {
    const __m512i v = held(numbers_at(part_at<F>(row, b))), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)};
  } else if constexpr (!is_k_quant(F)) {
    __m512i v, w;
    if (left >= 4) {
      const uint8_t* p = row + b * kBytes;
      v = pick_words<kBytes / 2, 1>(p);
      if constexpr (F == kQ8_0) w = pick_words<kBytes / 2, 9>(p);
    } else {
      const uint8_t* p[4];
      for (int i = 0; i < 4; ++i) p[i] = row + (b + block_in(i, left)) * kBytes + 2;
      v = load_quad(p[0], p[1], p[2], p[3]);
      if constexpr (F == kQ8_0) w = load_quad(p[0] + 16, p[1] + 16, p[2] + 16, p[3] + 16);
    }
    if constexpr (F == kQ8_0) {
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
      return {_mm512_xor_si512(v, sign), _mm512_xor_si512(w, sign)};
    } else {
      const __m512i mask = _mm512_set1_epi8(15);
      return {_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)};
    }
  } else {
    (void)left;
    const uint8_t* p = row + b / 8 * kBytes;
    const int half = static_cast<int>(b / 4 & 1);
    if constexpr (F == kQ5_Kx8) {
      const __m512i low = held(p + 48 + half * 64), nibble = _mm512_set1_epi8(15);
      const __m512i two = _mm512_broadcast_i64x4(load_256(p + 16)), sixteen = _mm512_set1_epi8(16);
      const __m512i bit = _mm512_slli_epi64(_mm512_inserti64x4(_mm512_set1_epi8(1), _mm256_set1_epi8(4), 1),
                                            static_cast<unsigned>(4 * half));
      const __m512i first = _mm512_and_si512(low, nibble);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
      return {_mm512_mask_add_epi8(first, _mm512_test_epi8_mask(two, bit), first, sixteen),
              _mm512_mask_add_epi8(second, _mm512_test_epi8_mask(two, _mm512_slli_epi64(bit, 1)), second,
                                   sixteen)};
    } else if constexpr (F == kQ6_Kx8) {
      const __m512i low = held(p + half * 64), two = _mm512_loadu_si512(p + 128);
      const __m512i nibble = _mm512_set1_epi8(15), high = _mm512_set1_epi8(0x30);
      const __m512i first = half ? two : _mm512_slli_epi16(two, 4);
      const __m512i second = half ? _mm512_srli_epi16(two, 2) : _mm512_slli_epi16(two, 2);
      return {_mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(first, high)),
              _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), nibble),
                              _mm512_and_si512(second, high))};
    } else if constexpr (F == kQ6_K) {
      const __m512i low = _mm512_loadu_si512(p + half * 64),
                    shifts = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
      // Brings the two bits of each of the four blocks to bits 4 and 5 of their bytes.
      const __m512i turns = _mm512_setr_epi64(4, 4, 2, 2, 0, 0, 62, 62), high = _mm512_set1_epi8(0x30);
      const uint8_t* two = p + 128 + half * 32;
      const __m512i first = _mm512_rolv_epi64(_mm512_broadcast_i32x4(load_128(two)), turns);
      const __m512i second = _mm512_rolv_epi64(_mm512_broadcast_i32x4(load_128(two + 16)), turns);
      return {_mm512_or_si512(nibble_lanes<0x88>(low, shifts), _mm512_and_si512(first, high)),
              _mm512_or_si512(nibble_lanes<0xDD>(low, shifts), _mm512_and_si512(second, high))};
    } else {
      const __m512i low = _mm512_loadu_si512(p + (F == kQ4_K ? 16 : 48) + half * 64);
      const __m512i shifts = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
      Quad quad{nibble_lanes<0xA0>(low, shifts), nibble_lanes<0xF5>(low, shifts)};
      if constexpr (F == kQ5_K) {
        const __m512i bit = _mm512_slli_epi64(
            _mm512_setr_epi32(0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x02020202, 0x02020202,
                              0x02020202, 0x02020202, 0x04040404, 0x04040404, 0x04040404, 0x04040404,
                              0x08080808, 0x08080808, 0x08080808, 0x08080808),
            static_cast<unsigned>(4 * half));
        const __m512i sixteen = _mm512_set1_epi8(16);
        const __mmask64 first = _mm512_test_epi8_mask(_mm512_broadcast_i32x4(load_128(p + 16)), bit);
        const __mmask64 second = _mm512_test_epi8_mask(_mm512_broadcast_i32x4(load_128(p + 32)), bit);
        quad.first = _mm512_mask_add_epi8(quad.first, first, quad.first, sixteen);
        quad.second = _mm512_mask_add_epi8(quad.second, second, quad.second, sixteen);
      }
      return quad;
    }
  }
}

// The bytes of blocks b to b + 3 of a row, of a format of nibbles, in the order of the file.
template <Format F, int>
[[gnu::always_inline]] static inline __m512i load_bytes(const uint8_t* row, int64_t b, int left) {
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  if constexpr (F == kQ4_0) {
    const auto part = [&](int i) { return load_128(row + (b + block_in(i, left)) * kBytes + 2); };
    __m512i v = _mm512_castsi128_si512(part(0));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, part(1));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, part(2));
    return _mm512_mask_broadcast_i32x4(v, 0xF000, part(3));
  } else if constexpr (is_in_halves(F)) {
    return held(numbers_at(part_at<F>(row, b)));
  } else {
    return _mm512_loadu_si512(row + b / 8 * kBytes + 16 + b / 4 % 2 * 64);
  }
}

// Scales of four blocks of four rows, in lanes block by block: of all numbers of a block or, in Q6_K, of the
// first 16 and the second 16; and the minima.
struct QuadScales {
  Vec first[kQuadVecs], second[kQuadVecs], least[kQuadVecs];
};

// The first word of each of four blocks of kStride words to places r, 4 + r, 8 + r and 12 + r.
template <int kStride>
[[gnu::always_inline]] static inline __m512i pick_scales(const uint8_t* p, int r, __m512i to) {
  constexpr int kSecond = 3 * kStride + 8 - 32;  // as far as pick_words reads
  constexpr auto kPlace = [](int i) {
    return static_cast<short>(i * kStride < 32 ? i * kStride : 32 + i * kStride - kSecond);
  };
  constexpr short a = kPlace(0), b = kPlace(1), c = kPlace(2), d = kPlace(3);
  const __m512i places =
      _mm512_castsi256_si512(_mm256_setr_epi16(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d));
  const auto where = static_cast<__mmask32>(0x1111 << r);
  if constexpr (3 * kStride < 32) return _mm512_mask_permutexvar_epi16(to, where, places, held(p));
  return _mm512_mask_mov_epi16(
      to, where,
      _mm512_permutex2var_epi16(_mm512_loadu_si512(p), places, _mm512_loadu_si512(p + 2 * kSecond)));
}

static inline Vec spread_rows(__m128 rows) { return _mm512_broadcast_f32x4(rows); }
static inline Vec floats_of_scales(__m128i bytes, Vec d) {
  return mul(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}
// Of the first or the second four parts of a superblock, which begins at p[r] in row r.
template <Format F>
[[gnu::always_inline]] static inline QuadScales scales_of_half(const KHeads& heads,
                                                               const uint8_t* const (&p)[4], int half) {
  const KScales k = k_scales<F>(heads, p, half);
  QuadScales scales{};
  scales.first[0] = floats_of_scales(k.first, spread_rows(heads.d));
  if constexpr (is_q6_k(F)) scales.second[0] = floats_of_scales(k.second, spread_rows(heads.d));
  if constexpr (has_minima(F)) scales.least[0] = floats_of_scales(k.least, spread_rows(heads.d_least));
  return scales;
}

template <Format F>
[[gnu::always_inline]] static inline QuadScales load_scales(const uint8_t* const (&rows)[4], int64_t b,
                                                            int left) {
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  __m256i halves;
  if constexpr (has_scales_apart(F)) {
    const uint8_t* p[4];
    for (int r = 0; r < 4; ++r) p[r] = scale_at(part_at<F>(rows[r], b));
    halves = turn_scales(p);
  } else if (left >= 4) {
    __m512i words = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) words = pick_scales<kBytes / 2>(rows[r] + b * kBytes, r, words);
    halves = _mm512_castsi512_si256(words);
  } else {
    int64_t at[4];
    for (int i = 0; i < 4; ++i) at[i] = (b + block_in(i, left)) * kBytes;
    const auto half = [&](int i, int r) { return static_cast<short>(load_u16(rows[r] + at[i])); };
    halves = _mm256_setr_epi16(  //
        half(0, 0), half(0, 1), half(0, 2), half(0, 3), half(1, 0), half(1, 1), half(1, 2), half(1, 3),
        half(2, 0), half(2, 1), half(2, 2), half(2, 3), half(3, 0), half(3, 1), half(3, 2), half(3, 3));
  }
  return {{_mm512_cvtph_ps(halves)}, {}, {}};
}

// Of one row with one token: sums of neighbouring products, of both halves of the blocks or, in Q6_K, of each
// half. Those of whole bytes are less what the offset adds to them; the others fit 16 bits without that.
struct QuadProducts {
  __m512i first, second;
};

template <Format F, int>
[[gnu::always_inline]] static inline QuadProducts multiply_quad(const Quad& w, const QuadToken& x) {
  const __m512i none = _mm512_setzero_si512();
  const __m512i begin = F == kQ8_0 ? _mm512_slli_epi32(_mm512_loadu_si512(x.minus), 7) : none;
  const __m512i first = _mm512_dpbusd_epi32(begin, w.first, _mm512_loadu_si512(x.first));
  return {first, _mm512_dpbusd_epi32(is_q6_k(F) ? none : first, w.second, _mm512_loadu_si512(x.second))};
}

// Sums of the four integers in each 128 bits of a, b, c and d, which become four neighbours.
static inline __m512i sum_fours(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// The same and `more`, of products with numbers of format F: in 16 bits as far as they fit.
template <Format F>
static inline __m512i sum_products(__m512i a, __m512i b, __m512i c, __m512i d, __m512i more) {
  if constexpr (F == kQ8_0) return sum_fours(a, b, c, d);
  const __m512i ones = _mm512_set1_epi16(1);
  const __m512i ab = _mm512_madd_epi16(_mm512_packs_epi32(a, b), ones);
  const __m512i cd = _mm512_madd_epi16(_mm512_packs_epi32(c, d), ones);
  if constexpr (is_q4_0(F) || is_q4_k(F)) {
    return _mm512_dpwssd_epi32(more, _mm512_packs_epi32(ab, cd), ones);
  } else {
    const __m512 one = _mm512_castsi512_ps(ab), two = _mm512_castsi512_ps(cd);
    const __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(one, two, 0x88));
    const __m512i odd = _mm512_castps_si512(_mm512_shuffle_ps(one, two, 0xDD));
    return _mm512_add_epi32(more, _mm512_add_epi32(even, odd));
  }
}

// What four blocks of four rows add to the sums: block i of row r to lane 4 i + r. Integers are exact, so
// that any other order of theirs gives the same; the float operations are the ones that panels repeat.
template <Format F, int v>
[[gnu::always_inline]] static inline Vec add_quads(const QuadProducts (&p)[4], const QuadScales& scales,
                                                   const QuadToken& x, Vec acc) {
  const Vec d = load(x.d), scale = mul(scales.first[v], d);
  if constexpr (is_q6_k(F)) {
    const __m512i minus = _mm512_slli_epi32(_mm512_loadu_si512(x.minus), 5);
    const __m512i one = sum_products<F>(p[0].first, p[1].first, p[2].first, p[3].first,
                                        _mm512_shuffle_epi32(minus, _MM_PERM_AAAA));
    const __m512i two = sum_products<F>(p[0].second, p[1].second, p[2].second, p[3].second,
                                        _mm512_shuffle_epi32(minus, _MM_PERM_BBBB));
    return fma(_mm512_cvtepi32_ps(two), mul(scales.second[v], d), fma(_mm512_cvtepi32_ps(one), scale, acc));
  } else {
    const __m512i more = is_q4_0(F) ? _mm512_loadu_si512(x.eight) : _mm512_setzero_si512();
    const __m512i all = sum_products<F>(p[0].second, p[1].second, p[2].second, p[3].second, more);
    acc = fma(_mm512_cvtepi32_ps(all), scale, acc);
    return has_minima(F) ? _mm512_fnmadd_ps(scales.least[v], load(x.sums), acc) : acc;
  }
}

// The sums of four rows: blocks 0, 4, 8 ... of a row are one sum, 1, 5, 9 ... the next.
static inline __m128 sum_blocks(const Vec (&acc)[kQuadVecs]) {
  const __m128 a = _mm_add_ps(_mm512_castps512_ps128(acc[0]), _mm512_extractf32x4_ps(acc[0], 1));
  return _mm_add_ps(a, _mm_add_ps(_mm512_extractf32x4_ps(acc[0], 2), _mm512_extractf32x4_ps(acc[0], 3)));
}

// The 32 numbers of a part as floats, without its scale. A nibble picks its value from a table of sixteen, of
// which the permutation reads the four low bits of an index only.
template <Format F>
static inline void load_numbers(const Part<F>& at, Vec (&w)[kBlock / kLanes]) {
  const uint8_t* p = numbers_at(at);
  const Vec nibbles = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vec table = sub(nibbles, splat(offset_of(F)));
  if constexpr (is_in_halves(F)) {
    const __m512i index = _mm512_cvtepu8_epi32(load_128(p));
    w[0] = _mm512_permutexvar_ps(index, table);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table);
  } else if constexpr (F == kQ4_K) {
    const __m128i shift = _mm_cvtsi32_si128(at.part % 2 * 4);
    p = at.block + 16 + at.part / 2 * 32;
    for (int v = 0; v < 2; ++v)
      w[v] =
          _mm512_permutexvar_ps(_mm512_srl_epi32(_mm512_cvtepu8_epi32(load_128(p + 16 * v)), shift), table);
  } else if constexpr (F == kQ8_0) {
    for (int v = 0; v < 2; ++v) w[v] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(p + 16 * v)));
  } else {
    const __m256i q = numbers<F>(at);
    w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
    w[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
  }
}

}  // namespace thermocline::THERMOCLINE_ISA
