// Scores of few queries and sums of their values, for one instruction set. Included by attend_<isa>.cpp after
// THERMOCLINE_ISA is defined and the simd header of the level is included; it says how many accumulators fit
// its registers, and how kLanes vectors are summed.

#include <string.h>

#include "kernels.h"

namespace thermocline::THERMOCLINE_ISA {

#include "parts.inl"

template <Format F>
static inline Vec load_floats(const uint8_t* row, int64_t c) {
  if constexpr (F == kF32) return load(row + 4 * c);
  if constexpr (F == kF16) return load_f16(row + 2 * c);
}

// The products of T queries and the R rows at `first`, query by query: T * R is kLanes. Of the rows, `count`
// are there; the others are the last again.
template <Format F, int T>
static inline Vec score_tile(const DotJob& job, const uint8_t* first, int64_t count, const float* x,
                             const Ahead& ahead, int64_t row) {
  constexpr int R = kLanes / T, kRows = R < 8 ? R : 8;
  const int64_t row_bytes = job.rows.row_bytes, x_stride = job.tokens.x_stride;
  Vec sums[kLanes];
#pragma GCC unroll 2
  for (int part = 0; part < R; part += kRows) {
    const uint8_t* rows[kRows];
    for (int j = 0; j < kRows; ++j)
      rows[j] = first + (count == R || part + j < count ? part + j : count - 1) * row_bytes;
    Vec acc[T][kRows];
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) acc[i][j] = zero();
    }
    // As much with every column as rows like these would take.
    constexpr int64_t kPiece = kRows * kLanes * kFormatInfo[F].block_bytes;
    const int64_t end = (row + part + kRows) * ahead.row_bytes;
    int64_t at = (row + part) * ahead.row_bytes;
    for (int64_t c = 0; c < job.columns; c += kLanes, at += kPiece) {
      fetch(ahead, at, at + kPiece < end ? at + kPiece : end);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) {
        const Vec w = load_floats<F>(rows[j], c);
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) acc[i][j] = fma(w, load(x + i * x_stride + c), acc[i][j]);
      }
    }
    fetch(ahead, at, end);
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) sums[i * R + part + j] = acc[i][j];
    }
  }
  return sum_all(sums);
}

template <Format F, int T>
static void score_queries(const DotJob& job, int64_t r0, int64_t r1, int64_t t, int64_t t1, Ahead ahead) {
  constexpr int R = kLanes / T;
  for (; t + T <= t1; t += T) {
    const float* x = job.tokens.x + t * job.tokens.x_stride;
    const uint8_t* row = job.rows.base + r0 * job.rows.row_bytes;
    for (int64_t r = r0; r < r1; r += R, row += R * job.rows.row_bytes) {
      float sums[kLanes];
      if (r1 - r >= R) {
        store(sums, score_tile<F, T>(job, row, R, x, ahead, r - r0));
        for (int i = 0; i < T; ++i)
          memcpy(job.out + (t + i) * job.out_stride + r, sums + i * R, R * sizeof(float));
      } else {
        store(sums, score_tile<F, T>(job, row, r1 - r, x, ahead, r - r0));
        for (int i = 0; i < T; ++i)
          memcpy(job.out + (t + i) * job.out_stride + r, sums + i * R,
                 static_cast<size_t>(r1 - r) * sizeof(float));
      }
    }
    ahead.row_bytes = 0;  // all was fetched with the first queries
  }
  if constexpr (T > 1) {
    if (t < t1) score_queries<F, T / 2>(job, r0, r1, t, t1, ahead);
  }
}

template <Format F>
static void score(const DotJob& job, int64_t r0, int64_t r1, int64_t t0, int64_t t1, const Ahead& ahead) {
  score_queries<F, kScoreQueries>(job, r0, r1, t0, t1, ahead);
}

// Vectors that are unpacked together.
template <Format F>
constexpr int kUnitVecs = is_integer(F) ? kBlock / kLanes : 1;

// V vectors of columns from c on of T queries stay in registers while rows k0 .. k1 are added.
template <Format F, int T, int V>
static inline void mix_tile(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t, int64_t c,
                            const Ahead& ahead) {
  const float* h = job.h + t * job.h_stride;
  float* acc = job.acc + t * job.acc_stride + c;
  Vec sum[T][V];
#pragma GCC unroll 8
  for (int i = 0; i < T; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = load(acc + i * job.acc_stride + v * kLanes);
  }
  const uint8_t* row = job.rows.base + k0 * job.rows.row_bytes;
  int64_t at = 0;
  for (int64_t k = k0; k < k1; ++k, row += job.rows.row_bytes, at += ahead.row_bytes) {
    fetch(ahead, at, at + ahead.row_bytes);
    Vec w[V];
    if constexpr (is_integer(F)) {
      constexpr int kUnit = kUnitVecs<F>;
#pragma GCC unroll 8
      for (int v = 0; v < V; v += kUnit) {
        Vec block[kUnit];
        load_block<F>(part_at<F>(row, c / kBlock + v / kUnit), block);
#pragma GCC unroll 8
        for (int u = 0; u < kUnit; ++u) w[v + u] = block[u];
      }
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = load_floats<F>(row, c + v * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) {
      const Vec scale = splat(h[i * job.h_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i][v] = fma(scale, w[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < T; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(acc + i * job.acc_stride + v * kLanes, sum[i][v]);
  }
}

template <Format F, int T, int V>
static inline void mix_columns(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t, int64_t c, int64_t c1,
                               Ahead ahead) {
  for (; c + V * kLanes <= c1; c += V * kLanes) {
    mix_tile<F, T, V>(job, k0, k1, t, c, ahead);
    ahead.row_bytes = 0;  // all was fetched with the first columns
  }
  if constexpr (V > kUnitVecs<F>) {
    if (c < c1) mix_columns<F, T, V / 2>(job, k0, k1, t, c, c1, ahead);
  }
}

template <Format F, int T>
static void mix_queries(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t, int64_t t1, int64_t columns,
                        Ahead ahead) {
  constexpr int kFit = kMixVecs / T < 8 ? kMixVecs / T : 8;
  for (; t + T <= t1; t += T) {
    mix_columns<F, T, (kFit > kUnitVecs<F> ? kFit : kUnitVecs<F>)>(job, k0, k1, t, 0, columns, ahead);
    ahead.row_bytes = 0;
  }
  if constexpr (T > 1) {
    if (t < t1) mix_queries<F, T / 2>(job, k0, k1, t, t1, columns, ahead);
  }
}

template <Format F>
static void mix(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t0, int64_t t1, int64_t columns,
                const Ahead& ahead) {
  constexpr int kMost = kMixVecs / kUnitVecs<F> < 8 ? kMixVecs / kUnitVecs<F> : 8;
  mix_queries<F, (kMost > 1 ? kMost : 1)>(job, k0, k1, t0, t1, columns, ahead);
}

static void blend(float* total, float keep, const float* part, float take, int64_t n) {
  const Vec a = splat(keep), b = splat(take);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store(total + c, fma(load(part + c), b, mul(load(total + c), a)));
  for (; c < n; ++c) total[c] = fma_one(part[c], take, total[c] * keep);
}

static constexpr AttendKernels make_attend() {
  AttendKernels kernels{};
  kernels.score[kF32] = score<kF32>;
  kernels.score[kF16] = score<kF16>;
  kernels.score[kQ8_0] = score_bytes;
  kernels.mix[kF32] = mix<kF32>;
  kernels.mix[kF16] = mix<kF16>;
  kernels.mix[kQ8_0] = mix<kQ8_0>;
  kernels.blend = blend;
  return kernels;
}

}  // namespace thermocline::THERMOCLINE_ISA
