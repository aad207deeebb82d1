// Sixteen float lanes: AVX-512 F, BW, VL, DQ and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "format.h"
#include "half.h"

namespace thermocline::THERMOCLINE_ISA {

typedef __m512 Vec;
constexpr int kLanes = 16;
// 4 x 6 accumulators, 6 tokens and a row take 31 of the 32 registers; integer tokens need three registers
// each.
constexpr int kDotRows = 4;
constexpr int kFloatTokens = 6;
constexpr int kIntTokens = 4;
constexpr int kAxpyRows = 4;

static inline Vec splat(float a) { return _mm512_set1_ps(a); }
static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec load(const void* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// Both return b where either is NaN.
static inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec keep_above(Vec x, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), x);
}
// 0 where x < limit, else 1.
static inline Vec step_from(Vec x, Vec limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), splat(1.0f));
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
static inline Vec power_of_two(Vec n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

static inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

static inline Vec load_f16(const uint8_t* p) { return _mm512_cvtph_ps(load_256(p)); }
static inline Vec load_bf16(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
}
static inline void store_f16(uint8_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline float scale_of(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

// 32 rounded values of x * inverse as bytes, and the sums of every four.
static inline void pack_block(const float* x, float inverse, int8_t* q, int16_t* sums) {
  const Vec scale = splat(inverse);
  const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(load(x), scale)));
  const __m128i high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(load(x + 16), scale)));
  const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm256_cvtepi32_epi16(fours));
}

// A step takes two blocks: lanes 0 to 7 hold the first, 8 to 15 the second.
constexpr int kStepBlocks = 2;

// VNNI multiplies unsigned by signed bytes. Weights are read with an offset that makes them unsigned (128 for
// Q8_0, 8 for Q4_0, which is stored so); `correction` is minus the offset times the sum of four
// activations and starts the sum, so that the integer result is exact.
struct IntTokens {
  __m512i q, correction;
  Vec d;
};
struct IntWeights {
  __m512i q;
  Vec d;
};

static inline Vec spread_pair(__m128 pair) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(pair));
}

template <Format F>
static inline IntTokens int_tokens(const int8_t* q, const float* d, const int16_t* sums) {
  const __m512i four = _mm512_slli_epi32(_mm512_cvtepi16_epi32(load_256(sums)), F == kQ8_0 ? 7 : 3);
  const __m128 pair = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(d)));
  return {_mm512_loadu_si512(q), _mm512_sub_epi32(_mm512_setzero_si512(), four), spread_pair(pair)};
}

template <Format F, bool Single>
static inline IntWeights int_weights(const uint8_t* p) {
  constexpr int kBytes = kFormatInfo[F].block_bytes;
  const uint8_t* second = Single ? p : p + kBytes;
  const uint32_t scales = load_u16(p) | (Single ? 0u : static_cast<uint32_t>(load_u16(second)) << 16);
  const Vec d = spread_pair(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(scales))));
  if constexpr (F == kQ8_0) {
    __m512i q = _mm512_castsi256_si512(load_256(p + 2));
    q = _mm512_inserti64x4(q, load_256(second + 2), 1);
    return {_mm512_xor_si512(q, _mm512_set1_epi8(static_cast<char>(0x80))), d};
  } else {
    __m512i q = _mm512_broadcast_i32x4(load_128(p + 2));
    q = _mm512_mask_broadcast_i32x4(q, 0xFF00, load_128(second + 2));
    q = _mm512_srlv_epi64(q, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    return {_mm512_and_si512(q, _mm512_set1_epi8(15)), d};
  }
}

static inline Vec int_dot(const IntWeights& w, const IntTokens& x) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.correction, w.q, x.q));
}

// The 32 floats of a block. A nibble picks its value from a table of sixteen, of which the permutation reads
// the four low bits of an index only.
template <Format F>
static inline void load_block(const uint8_t* p, Vec (&w)[kBlock / kLanes]) {
  const Vec d = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(load_u16(p))));
  if constexpr (F == kQ8_0) {
    w[0] = mul(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(p + 2))));
    w[1] = mul(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(p + 18))));
  } else {
    const Vec table = mul(d, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i index = _mm512_cvtepu8_epi32(load_128(p + 2));
    w[0] = _mm512_permutexvar_ps(index, table);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table);
  }
}

}  // namespace thermocline::THERMOCLINE_ISA
