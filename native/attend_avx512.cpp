#define THERMOCLINE_ISA avx512_level
#include "kernels.h"
#include "simd_avx512.h"

namespace thermocline::THERMOCLINE_ISA {

constexpr int kScoreQueries = 4, kByteQueries = 4, kMixVecs = 16;

// Sums of even and odd neighbours of a, then of b, in each 128 bits.
static inline Vec add_neighbours(Vec a, Vec b) {
  return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}

// What sum() gives for each, in the same order: halves are added first, then quarters, then neighbours.
static inline Vec sum_all(const Vec (&acc)[kLanes]) {
  Vec four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto halves = [&](int j) {
      return add(_mm512_shuffle_f32x4(acc[j], acc[j + 4], 0x44),
                 _mm512_shuffle_f32x4(acc[j], acc[j + 4], 0xEE));
    };
    const Vec low = halves(i), high = halves(i + 8);
    four[i] = add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
  }
  return add_neighbours(add_neighbours(four[0], four[1]), add_neighbours(four[2], four[3]));
}

// Four blocks of four rows in Q8_0 from block b on: of each row the numbers of the first two and of the
// others, with an offset of 128 that makes them unsigned; and the scales, block by block.
struct FourRows {
  __m512i low[4], high[4];
  Vec scales;
};

static inline __m512i two_blocks(const uint8_t* first, const uint8_t* second) {
  const __m512i pair =
      _mm512_inserti64x4(_mm512_castsi256_si512(load_256(first + 2)), load_256(second + 2), 1);
  return _mm512_xor_si512(pair, _mm512_set1_epi8(static_cast<char>(0x80)));
}

// `left` blocks are there from b on, whose last one stands for those past it.
static inline FourRows load_rows(const uint8_t* const (&rows)[4], int64_t b, int left) {
  constexpr int kBytes = kFormatInfo[kQ8_0].block_bytes;
  FourRows four;
  if (left >= 4) {
    // The scales of two blocks are the words 0 and 17 of 64 bytes; row r's go to the places r, 4 + r, 8 + r,
    // 12 + r.
    const __m512i places =
        _mm512_castsi256_si512(_mm256_setr_epi16(0, 0, 0, 0, 17, 17, 17, 17, 32, 32, 32, 32, 49, 49, 49, 49));
    __m256i halves = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const uint8_t* p = rows[r] + b * kBytes;
      four.low[r] = two_blocks(p, p + kBytes);
      four.high[r] = two_blocks(p + 2 * kBytes, p + 3 * kBytes);
      const __m512i scales = _mm512_maskz_permutex2var_epi16(0x1111u << r, _mm512_loadu_si512(p), places,
                                                             _mm512_loadu_si512(p + 2 * kBytes));
      halves = _mm256_or_si256(halves, _mm512_castsi512_si256(scales));
    }
    four.scales = _mm512_cvtph_ps(halves);
  } else {
    int64_t at[4];
    for (int i = 0; i < 4; ++i) at[i] = (b + block_in(i, left)) * kBytes;
    for (int r = 0; r < 4; ++r) {
      four.low[r] = two_blocks(rows[r] + at[0], rows[r] + at[1]);
      four.high[r] = two_blocks(rows[r] + at[2], rows[r] + at[3]);
    }
    four.scales = load_scales<kQ8_0>(rows, b, left).first[0];
  }
  return four;
}

// What add_quads adds for one token: block i of row r to lane 4 i + r.
static inline Vec add_rows(const FourRows& four, const int8_t* q, Vec d, __m512i lift, Vec acc) {
  const __m512i none = _mm512_setzero_si512(), low = _mm512_loadu_si512(q), high = _mm512_loadu_si512(q + 64);
  __m512i sums[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i a = _mm512_dpbusd_epi32(none, four.low[r], low);
    const __m512i b = _mm512_dpbusd_epi32(none, four.high[r], high);
    sums[r] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  }
  const __m512i all = _mm512_sub_epi32(sum_fours(sums[0], sums[1], sums[2], sums[3]), lift);
  return fma(_mm512_cvtepi32_ps(all), mul(four.scales, d), acc);
}

static inline __m512i spread_blocks(__m128i four) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(four));
}

// Sixteen rows, of which `count` are there, and T queries.
template <int T>
static inline void score_bytes_tile(const DotJob& job, const uint8_t* first, int64_t count, int64_t t,
                                    const Ahead& ahead, int64_t row, float (&out)[T][16]) {
  const Tokens& tokens = job.tokens;
  const int64_t blocks = job.columns / kBlock;
  Vec acc[T][4][kQuadVecs];
  for (int i = 0; i < T; ++i) {
    for (int j = 0; j < 4; ++j) acc[i][j][0] = zero();
  }
  for (int64_t b = 0; b < blocks; b += 4) {
    Vec d[T];
    __m512i lift[T];
    const int8_t* q[T];
#pragma GCC unroll 4
    for (int i = 0; i < T; ++i) {
      const int64_t at = (t + i) * tokens.q_stride + b * kBlock;
      q[i] = tokens.q + at;
      d[i] = _mm512_castsi512_ps(spread_blocks(load_128(tokens.d + at / kBlock)));
      const __m128i sums = _mm_madd_epi16(load_128(tokens.sums + at / 16), _mm_set1_epi16(1));
      lift[i] = _mm512_slli_epi32(spread_blocks(sums), 7);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (b == 0) fetch(ahead, (row + 4 * j) * ahead.row_bytes, (row + 4 * j + 4) * ahead.row_bytes);
      const uint8_t* rows[4];
      for (int r = 0; r < 4; ++r)
        rows[r] = first + (count == 16 || 4 * j + r < count ? 4 * j + r : count - 1) * job.rows.row_bytes;
      const FourRows four = load_rows(rows, b, static_cast<int>(blocks - b < 4 ? blocks - b : 4));
#pragma GCC unroll 4
      for (int i = 0; i < T; ++i) acc[i][j][0] = add_rows(four, q[i], d[i], lift[i], acc[i][j][0]);
    }
  }
  for (int i = 0; i < T; ++i) {
    for (int j = 0; j < 4; ++j) _mm_storeu_ps(out[i] + 4 * j, sum_blocks(acc[i][j]));
  }
}

template <int T>
static void score_bytes_queries(const DotJob& job, int64_t r0, int64_t r1, int64_t t, int64_t t1,
                                Ahead ahead) {
  for (; t + T <= t1; t += T) {
    for (int64_t r = r0; r < r1; r += 16) {
      const uint8_t* row = job.rows.base + r * job.rows.row_bytes;
      const int64_t count = r1 - r < 16 ? r1 - r : 16;
      float sums[T][16];
      if (count == 16) {
        score_bytes_tile<T>(job, row, 16, t, ahead, r - r0, sums);
      } else {
        score_bytes_tile<T>(job, row, count, t, ahead, r - r0, sums);
      }
      for (int i = 0; i < T; ++i)
        std::memcpy(job.out + (t + i) * job.out_stride + r, sums[i],
                    static_cast<size_t>(count) * sizeof(float));
    }
    ahead.row_bytes = 0;  // all was fetched with the first queries
  }
  if constexpr (T > 1) {
    if (t < t1) score_bytes_queries<T / 2>(job, r0, r1, t, t1, ahead);
  }
}

static void score_bytes(const DotJob& job, int64_t r0, int64_t r1, int64_t t0, int64_t t1,
                        const Ahead& ahead) {
  score_bytes_queries<kByteQueries>(job, r0, r1, t0, t1, ahead);
}

}  // namespace thermocline::THERMOCLINE_ISA

#include "attend.inl"

namespace thermocline {

constexpr AttendKernels kAvx512Attend = THERMOCLINE_ISA::make_attend();

}  // namespace thermocline
