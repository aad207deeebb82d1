// The numbers of block formats in vectors of 256 bits, for the levels that have AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "format.h"

namespace thermocline::THERMOCLINE_ISA {

static inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// The low halves of 16 bytes, then the high ones.
static inline __m256i nibbles(const uint8_t* p) {
  const __m128i packed = load_128(p);
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// One half of each of 32 bytes.
static inline __m256i half_bytes(const uint8_t* p, bool high) {
  return _mm256_and_si256(_mm256_srl_epi16(load_256(p), _mm_cvtsi32_si128(high ? 4 : 0)),
                          _mm256_set1_epi8(15));
}

// The scales of four neighbouring blocks of four rows, which begin at p[r] in row r: block i of row r at
// place 4 * i + r.
static inline __m256i turn_scales(const uint8_t* const (&p)[4]) {
  const auto row = [&](int r) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p[r])); };
  const __m128i ab = _mm_unpacklo_epi16(row(0), row(1)), cd = _mm_unpacklo_epi16(row(2), row(3));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi32(ab, cd)),
                                 _mm_unpackhi_epi32(ab, cd), 1);
}

// The 32 numbers of a part, without its scale.
template <Format F>
static inline __m256i numbers(const Part<F>& at) {
  const uint8_t* p = at.block;
  const int j = at.part;
  if constexpr (F == kQ8_0) {
    return load_256(numbers_at(at));
  } else if constexpr (is_in_halves(F)) {
    return _mm256_sub_epi8(nibbles(numbers_at(at)), _mm256_set1_epi8(offset_of(F)));
  } else if constexpr (F == kQ5_Kx8) {
    const __m256i bit = _mm256_inserti128_si256(_mm256_set1_epi8(static_cast<char>(1 << j / 2 * 2)),
                                                _mm_set1_epi8(static_cast<char>(2 << j / 2 * 2)), 1);
    const __m256i two = _mm256_broadcastsi128_si256(load_128(p + 16 + 16 * (j % 2)));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(two, bit), bit);
    return _mm256_or_si256(nibbles(p + 48 + 16 * j), _mm256_and_si256(set, _mm256_set1_epi8(16)));
  } else if constexpr (F == kQ6_Kx8) {
    const __m128i two = load_128(p + 128 + 16 * (j % 4)),
                  first = _mm_srl_epi16(two, _mm_cvtsi32_si128(j / 4 * 4));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_srli_epi16(first, 2), 1);
    const __m256i high = _mm256_slli_epi16(_mm256_and_si256(both, _mm256_set1_epi8(3)), 4);
    return _mm256_sub_epi8(_mm256_or_si256(nibbles(p + 16 * j), high), _mm256_set1_epi8(32));
  } else if constexpr (F == kQ4_K) {
    return half_bytes(p + 16 + j / 2 * 32, j % 2);
  } else if constexpr (F == kQ5_K) {
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << j));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(load_256(p + 16), bit), bit);
    return _mm256_or_si256(half_bytes(p + 48 + j / 2 * 32, j % 2),
                           _mm256_and_si256(set, _mm256_set1_epi8(16)));
  } else {
    const int k = j % 4;
    const __m256i low = half_bytes(p + j / 4 * 64 + k % 2 * 32, k / 2);
    const __m256i two = _mm256_srl_epi16(load_256(p + 128 + j / 4 * 32), _mm_cvtsi32_si128(2 * k));
    const __m256i high = _mm256_slli_epi16(_mm256_and_si256(two, _mm256_set1_epi8(3)), 4);
    return _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
  }
}

}  // namespace thermocline::THERMOCLINE_ISA
