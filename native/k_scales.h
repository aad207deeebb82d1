// The scales of K-quants, of four rows at a time, for the levels that have AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "format.h"
#include "half.h"

namespace thermocline::THERMOCLINE_ISA {

static inline int load_int(const uint8_t* p) {
  int value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
static inline __m128i ints_of(const uint8_t* const (&p)[4], int at) {
  return _mm_setr_epi32(load_int(p[0] + at), load_int(p[1] + at), load_int(p[2] + at), load_int(p[3] + at));
}
static inline __m128 halves_of(const uint8_t* const (&p)[4], int at) {
  const auto half = [&](int i) { return static_cast<short>(load_u16(p[i] + at)); };
  return _mm_cvtph_ps(_mm_setr_epi16(half(0), half(1), half(2), half(3), 0, 0, 0, 0));
}

// Of four parts of four rows: bytes, with part i of row r at place 4 * i + r, and the floats that they are
// multiplied with, of each row. In Q6_K `first` and `second` belong to the halves of a part; else `first` to
// all of it, and `least` is the minimum.
struct KScales {
  __m128i first, second, least;
  __m128 d, d_least;
};

// Parts b to b + 3, of which b is a multiple of four.
template <Format F>
[[gnu::always_inline]] static inline KScales k_scales(const uint8_t* const (&rows)[4], int64_t b) {
  const uint8_t* p[4];
  for (int r = 0; r < 4; ++r) p[r] = rows[r] + b / 8 * kFormatInfo[F].block_bytes;
  const int half = static_cast<int>(b / 4 % 2);
  KScales k;
  k.d = halves_of(p, F == kQ6_K ? 208 : 0);
  if constexpr (F == kQ6_K) {
    const auto bytes = [&](int r) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p[r] + 192 + 8 * half));
    };
    const __m128i ab = _mm_unpacklo_epi8(bytes(0), bytes(1)), cd = _mm_unpacklo_epi8(bytes(2), bytes(3));
    const __m128 low = _mm_castsi128_ps(_mm_unpacklo_epi16(ab, cd));
    const __m128 high = _mm_castsi128_ps(_mm_unpackhi_epi16(ab, cd));
    k.first = _mm_castps_si128(_mm_shuffle_ps(low, high, 0x88));
    k.second = _mm_castps_si128(_mm_shuffle_ps(low, high, 0xDD));
  } else {
    const __m128i six = _mm_set1_epi8(63), four = _mm_set1_epi8(15), two = _mm_set1_epi8(0x30);
    __m128i scale = ints_of(p, 4), least = ints_of(p, 8);
    if (half == 0) {
      scale = _mm_and_si128(scale, six);
      least = _mm_and_si128(least, six);
    } else {
      const __m128i low = ints_of(p, 12);
      scale = _mm_or_si128(_mm_and_si128(low, four), _mm_and_si128(_mm_srli_epi16(scale, 2), two));
      least = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(low, 4), four),
                           _mm_and_si128(_mm_srli_epi16(least, 2), two));
    }
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    k.first = _mm_shuffle_epi8(scale, turn);
    k.least = _mm_shuffle_epi8(least, turn);
    k.d_least = halves_of(p, 2);
  }
  return k;
}

}  // namespace thermocline::THERMOCLINE_ISA
