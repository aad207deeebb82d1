// The scales of K-quants, of four rows at a time, for the levels that have AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "format.h"
#include "half.h"
#include "numbers_256.h"

namespace thermocline::THERMOCLINE_ISA {

static inline int load_int(const uint8_t* p) {
  int value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// What four rows have once for the eight parts of a superblock: of Q4_K and Q5_K the scales and minima of all
// parts as they are packed, four bytes of each row; and the floats that these are multiplied with, of each
// row.
struct KHeads {
  __m128i packed[3];
  __m128 d, d_least;
};

// Of the superblock that begins at p[r] in row r.
template <Format F>
[[gnu::always_inline]] static inline KHeads k_heads(const uint8_t* const (&p)[4]) {
  KHeads heads;
  if constexpr (is_q6_k(F)) {
    const auto half = [&](int r) { return static_cast<short>(load_u16(p[r] + 208)); };
    heads.d = _mm_cvtph_ps(_mm_setr_epi16(half(0), half(1), half(2), half(3), 0, 0, 0, 0));
  } else {
    const __m128i a = load_128(p[0]), b = load_128(p[1]), c = load_128(p[2]), d = load_128(p[3]);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ef = _mm_unpackhi_epi32(a, b), gh = _mm_unpackhi_epi32(c, d);
    heads.packed[0] = _mm_unpackhi_epi64(ab, cd);
    heads.packed[1] = _mm_unpacklo_epi64(ef, gh);
    heads.packed[2] = _mm_unpackhi_epi64(ef, gh);
    const __m128i halves = _mm_shuffle_epi8(
        _mm_unpacklo_epi64(ab, cd), _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    heads.d = _mm_cvtph_ps(halves);
    heads.d_least = _mm_cvtph_ps(_mm_unpackhi_epi64(halves, halves));
  }
  return heads;
}

// Of four parts of four rows: bytes, with part i of row r at place 4 * i + r. In Q6_K `first` and `second`
// belong to the halves of a part; else `first` to all of it, and `least` is the minimum.
struct KScales {
  __m128i first, second, least;
};

// Of the first four parts of a superblock, or the second four.
template <Format F>
[[gnu::always_inline]] static inline KScales k_scales(const KHeads& heads, const uint8_t* const (&p)[4],
                                                      int half) {
  KScales k;
  if constexpr (is_q6_k(F)) {
    const auto bytes = [&](int r) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p[r] + 192 + 8 * half));
    };
    const __m128i ab = _mm_unpacklo_epi8(bytes(0), bytes(1)), cd = _mm_unpacklo_epi8(bytes(2), bytes(3));
    const __m128 low = _mm_castsi128_ps(_mm_unpacklo_epi16(ab, cd));
    const __m128 high = _mm_castsi128_ps(_mm_unpackhi_epi16(ab, cd));
    k.first = _mm_castps_si128(_mm_shuffle_ps(low, high, 0x88));
    k.second = _mm_castps_si128(_mm_shuffle_ps(low, high, 0xDD));
  } else {
    (void)p;
    const __m128i six = _mm_set1_epi8(63), four = _mm_set1_epi8(15), two = _mm_set1_epi8(0x30);
    __m128i scale = heads.packed[0], least = heads.packed[1];
    if (half == 0) {
      scale = _mm_and_si128(scale, six);
      least = _mm_and_si128(least, six);
    } else {
      const __m128i low = heads.packed[2];
      scale = _mm_or_si128(_mm_and_si128(low, four), _mm_and_si128(_mm_srli_epi16(scale, 2), two));
      least = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(low, 4), four),
                           _mm_and_si128(_mm_srli_epi16(least, 2), two));
    }
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    k.first = _mm_shuffle_epi8(scale, turn);
    k.least = _mm_shuffle_epi8(least, turn);
  }
  return k;
}

}  // namespace thermocline::THERMOCLINE_ISA
