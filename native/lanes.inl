// Sums of scaled rows in formats of nibbles, 128 columns at a time, with the numbers taken from the 32-bit
// lanes in which they lie: a shift and a table a vector, and nothing is spread from bytes to lanes. The sums
// lie in the order of these lanes, in which each column still takes its rows one after another, and are put
// in order at the end.

constexpr int kLaneColumns = 4 * kBlock;

template <Format F>
constexpr bool has_lanes = F == kQ4_0 || F == kQ4_K;

// 128 floats, or their sums: `at[v][t]` has those of half v of byte t of each lane.
struct Lanes {
  Vec at[2][4];
};

// The column of byte 0 of a lane.
template <Format F>
constexpr int lane_column(int lane, int v) {
  return F == kQ4_K ? lane / 8 * 64 + v * 32 + lane % 8 * 4 : lane / 4 * 32 + v * 16 + lane % 4 * 4;
}

// The numbers of four blocks of a row. A permutation reads the four low bits of an index only.
template <Format F>
[[gnu::always_inline]] static inline void load_lanes(__m512i nibbles, Lanes& w) {
  const Vec table =
      sub(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), splat(offset_of(F)));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i index = _mm512_srli_epi32(nibbles, static_cast<unsigned>(4 * i));
    w.at[i % 2][i / 2] = _mm512_permutexvar_ps(index, table);
  }
}

// What belongs to row r, from values of which lane 4 * i + r has those of block i of row r.
template <Format F, int r>
[[gnu::always_inline]] static inline Vec pick_row(Vec values, int v) {
  if constexpr (F == kQ4_K) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8);
    return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * v + r)), values);
  } else {
    return _mm512_permute_ps(values, r * 0x55);
  }
}

// What a step adds, as far as it is worth loading while the step before is computed: a step that began with
// loads would wait for them.
struct LaneStep {
  QuadScales co;
  __m512i nibbles[4];
};

template <Format F, int R>
[[gnu::always_inline]] static inline LaneStep load_lane_step(const uint8_t* const (&rows)[4], int64_t b,
                                                             Vec factor) {
  LaneStep step;
  step.co = load_scales<F>(rows, b, b + 3);
  step.co.first[0] = mul(step.co.first[0], factor);
  if constexpr (has_minima(F)) step.co.least[0] = mul(step.co.least[0], factor);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) step.nibbles[r] = load_nibbles<F>(rows[r], b);
  return step;
}

template <Format F, int r>
[[gnu::always_inline]] static inline void add_lanes(const LaneStep& step, Lanes& sum) {
  Lanes w;
  load_lanes<F>(step.nibbles[r], w);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const Vec factor = pick_row<F, r>(step.co.first[0], v);
    const Vec least = has_minima(F) ? pick_row<F, r>(step.co.least[0], v) : zero();
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      sum.at[v][t] = fma(w.at[v][t], factor, sum.at[v][t]);
      if constexpr (has_minima(F)) sum.at[v][t] = sub(sum.at[v][t], least);
    }
  }
}

template <Format F, int R>
static void add_lane_tile(const AxpyJob& job, int64_t k, int64_t end, int64_t c0, int64_t quads) {
  const RowTile<R> tile = row_tile<R>(job.rows, k, end);
  const uint8_t* rows[4];
  float h[4];
  for (int r = 0; r < 4; ++r) {
    const int i = r < R ? r : R - 1;
    rows[r] = tile.now[i];
    h[r] = job.h[job.positions ? job.positions[k + i] : k + i];
  }
  const Vec factor = spread_rows(_mm_loadu_ps(h));
  const int64_t first = c0 / kBlock;
  LaneStep next = load_lane_step<F, R>(rows, first, factor);
  constexpr int kStepBytes = kLaneColumns * kFormatInfo[F].block_bytes / kFormatInfo[F].block;
  for_steps<true, kStepBytes>(tile, bytes_of<F>(c0), quads, [&](int64_t s) __attribute__((always_inline)) {
    const int64_t b = first + 4 * s;
    const LaneStep step = next;
    next = load_lane_step<F, R>(rows, s + 1 < quads ? b + 4 : b, factor);
    float* acc = job.acc + s * kLaneColumns;
    Lanes sum;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum.at[i / 4][i % 4] = load(acc + i * kLanes);
    add_lanes<F, 0>(step, sum);
    if constexpr (R > 1) add_lanes<F, 1>(step, sum);
    if constexpr (R > 2) add_lanes<F, 2>(step, sum);
    if constexpr (R > 3) add_lanes<F, 3>(step, sum);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) store(acc + i * kLanes, sum.at[i / 4][i % 4]);
  });
}

// From the order of lanes to that of columns.
template <Format F>
static void order_lanes(float* acc) {
  Lanes sum;
  for (int i = 0; i < 8; ++i) sum.at[i / 4][i % 4] = load(acc + i * kLanes);
  for (int v = 0; v < 2; ++v) {
    const Vec(&at)[4] = sum.at[v];
    const auto low = [](Vec a, Vec b) { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
    const auto high = [](Vec a, Vec b) { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
    const __m512d a = low(at[0], at[1]), b = low(at[2], at[3]);
    const __m512d c = high(at[0], at[1]), d = high(at[2], at[3]);
    const __m512d fours[4] = {_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b), _mm512_unpacklo_pd(c, d),
                              _mm512_unpackhi_pd(c, d)};
    for (int i = 0; i < 4; ++i) {
      const Vec four = _mm512_castpd_ps(fours[i]);
      const auto put = [&](int lane, __m128 values) { _mm_storeu_ps(acc + lane_column<F>(lane, v), values); };
      put(i, _mm512_castps512_ps128(four));
      put(4 + i, _mm512_extractf32x4_ps(four, 1));
      put(8 + i, _mm512_extractf32x4_ps(four, 2));
      put(12 + i, _mm512_extractf32x4_ps(four, 3));
    }
  }
}

// The first columns of a job, as many as the lanes take; returns how many these are. `acc` holds zeros
// before.
template <Format F>
static int64_t add_by_lanes(const AxpyJob& job, int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
  if constexpr (has_lanes<F>) {
    const int64_t quads = (c1 - c0) / kLaneColumns;
    if (quads == 0) return 0;
    int64_t k = k0;
    for (; k + 4 <= k1; k += 4) add_lane_tile<F, 4>(job, k, k1, c0, quads);
    if (k1 - k == 3) add_lane_tile<F, 3>(job, k, k1, c0, quads);
    if (k1 - k == 2) add_lane_tile<F, 2>(job, k, k1, c0, quads);
    if (k1 - k == 1) add_lane_tile<F, 1>(job, k, k1, c0, quads);
    for (int64_t s = 0; s < quads; ++s) order_lanes<F>(job.acc + s * kLaneColumns);
    return quads * kLaneColumns;
  }
  return 0;
}
