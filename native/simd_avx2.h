// Eight float lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "format.h"
#include "half.h"
#include "numbers_256.h"

namespace thermocline::THERMOCLINE_ISA {

typedef __m256 Vec;
constexpr int kLanes = 8;
// 4 x 3 accumulators, 3 tokens and a row fill the 16 registers.
constexpr int kDotRows = 4;
constexpr int kFloatRows = 4;
constexpr int kFloatTokens = 3;
constexpr int kIntPanelTokens = 12;
// What unpacks in few steps gains nothing from sums that spill.
template <Format F>
constexpr int kIntTokens = is_q4_0(F) || is_q4_k(F) ? 2 : 4;
template <Format F>
constexpr int kFloatPanelTokens = F == kF32    ? 24
                                  : F == kBF16 ? 32
                                               : 96;
constexpr int kAxpyRows = 4;

static inline Vec splat(float a) { return _mm256_set1_ps(a); }
static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
// One lane of fma().
static inline float fma_one(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// Both return b where either is NaN.
static inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec keep_above(Vec x, Vec limit) {
  return _mm256_and_ps(x, _mm256_cmp_ps(x, limit, _CMP_GT_OQ));
}
// gate * x, 0 where the gate is.
static inline Vec gated(Vec gate, Vec x) {
  return _mm256_andnot_ps(_mm256_cmp_ps(gate, _mm256_setzero_ps(), _CMP_EQ_OQ), _mm256_mul_ps(gate, x));
}
static inline Vec gather(const float* x, const int32_t* places) {
  return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places)), sizeof(float));
}
// v, 0 where x < limit.
static inline Vec keep_from(Vec v, Vec x, Vec limit) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), v);
}

static inline uint32_t at_least(Vec a, Vec limit) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, limit, _CMP_GE_OQ)));
}
// The places of the set bits of every byte, one byte each, lowest first.
struct BitPlaces {
  uint64_t of[256];
  constexpr BitPlaces() : of() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (bits >> i & 1) of[bits] |= static_cast<uint64_t>(i) << (8 * count++);
      }
    }
  }
};
static constexpr BitPlaces kBitPlaces;
static inline int list_bits(uint32_t bits, int32_t base, int32_t* out) {
  const __m128i places = _mm_cvtsi64_si128(static_cast<int64_t>(kBitPlaces.of[bits]));
  const __m256i ids = _mm256_add_epi32(_mm256_cvtepu8_epi32(places), _mm256_set1_epi32(base));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), ids);
  return __builtin_popcount(bits);
}

static inline __m128 fold(Vec v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
static inline float sum(Vec v) {
  const __m128 pair = _mm_hadd_ps(fold(v), fold(v));
  return _mm_cvtss_f32(_mm_hadd_ps(pair, pair));
}
static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
}
static inline float largest(Vec v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec power_of_two(Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// x * 2^n for whole n up to 128, whose power is no float: by two halves of it.
static inline Vec times_power(Vec x, Vec n) {
  const Vec half = nearest(mul(n, splat(0.5f)));
  return mul(mul(x, power_of_two(half)), power_of_two(sub(n, half)));
}

static inline Vec load_f16(const uint8_t* p) { return _mm256_cvtph_ps(load_128(p)); }
static inline Vec load_bf16(const uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
static inline void store_f16(uint8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline float scale_of(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

// 32 rounded values of x * inverse as bytes, and the sums of both halves.
static inline void pack_block(const float* x, float inverse, int8_t* q, int16_t* sums) {
  const Vec scale = splat(inverse);
  __m256i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm256_cvtps_epi32(mul(load(x + 8 * i), scale));
  // The packs work within 128-bit lanes, so that the words come out as 0 2 4 6 1 3 5 7 and are put in order.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), ordered);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), ordered);
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  const __m256i two = _mm256_hadd_epi32(fours, fours), one = _mm256_hadd_epi32(two, two);
  sums[0] = static_cast<int16_t>(_mm256_extract_epi32(one, 0));
  sums[1] = static_cast<int16_t>(_mm256_extract_epi32(one, 4));
}

static inline Vec floats_of_bytes(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

// The 32 numbers of a part as floats, without its scale.
template <Format F>
static inline void load_numbers(const Part<F>& at, Vec (&w)[kBlock / kLanes]) {
  const __m256i q = numbers<F>(at);
  const __m128i low = _mm256_castsi256_si128(q), high = _mm256_extracti128_si256(q, 1);
  w[0] = floats_of_bytes(low);
  w[1] = floats_of_bytes(_mm_srli_si128(low, 8));
  w[2] = floats_of_bytes(high);
  w[3] = floats_of_bytes(_mm_srli_si128(high, 8));
}

}  // namespace thermocline::THERMOCLINE_ISA
