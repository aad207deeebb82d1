// Sums of scaled rows in integer formats, for the down projection of one token: the factor of a neuron and
// the scale of a block become one coefficient first, so that a number costs a conversion and one operation.
// The tiles of a batch repeat the same operations, so that its sums are the same to the bit.

// The coefficients that four blocks of four rows have for their numbers, place 4 * i + r for block i of row
// r: one for all numbers or, in Q6_K, for the first 16 and the second 16; and what a minimum takes off.
struct alignas(64) Coefficients {
  float first[16], second[16], least[16];
};

// Coefficients of blocks b to b + 3, of which `last` is the last that there is.
#ifdef THERMOCLINE_QUADS
template <Format F>
static inline void load_coefficients(const uint8_t* const (&rows)[4], int64_t b, int64_t last,
                                     const float (&h)[4], Coefficients* to) {
  const QuadScales scales = load_scales<F>(rows, b, last);
  const Vec factor = spread_rows(_mm_loadu_ps(h));
  for (int v = 0; v < kQuadVecs; ++v) {
    store(to->first + v * kLanes, mul(scales.first[v], factor));
    if constexpr (F == kQ6_K) store(to->second + v * kLanes, mul(scales.second[v], factor));
    if constexpr (has_minima(F)) store(to->least + v * kLanes, mul(scales.least[v], factor));
  }
}
#else
template <Format F>
static inline void load_coefficients(const uint8_t* const (&rows)[4], int64_t b, int64_t last,
                                     const float (&h)[4], Coefficients* to) {
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < 4; ++r) {
      const PartScales s = part_scales<F>(part_at<F>(rows[r], b + i < last ? b + i : last));
      to->first[4 * i + r] = s.scale[0] * h[r];
      if constexpr (F == kQ6_K) to->second[4 * i + r] = s.scale[1] * h[r];
      if constexpr (has_minima(F)) to->least[4 * i + r] = s.least * h[r];
    }
  }
}
#endif

// acc += coefficient * number - least, for the numbers of a block.
template <Format F>
static inline void add_numbers(const Vec (&w)[kBlock / kLanes], float first, float second, float least,
                               Vec (&sum)[kBlock / kLanes]) {
#pragma GCC unroll 8
  for (int v = 0; v < kBlock / kLanes; ++v) {
    sum[v] = fma(w[v], splat(F == kQ6_K && v * kLanes >= 16 ? second : first), sum[v]);
    if constexpr (has_minima(F)) sum[v] = sub(sum[v], splat(least));
  }
}

template <Format F, int R>
static void add_scaled_tile(const AxpyJob& job, int64_t k, int64_t end, int64_t c0, int64_t c1) {
  const RowTile<R> tile = row_tile<R>(job.rows, k, end);
  const uint8_t* rows[4];
  float h[4];
  for (int r = 0; r < 4; ++r) {
    const int64_t at = k + (r < R ? r : R - 1);
    rows[r] = tile.now[r < R ? r : R - 1];
    h[r] = job.h[job.positions ? job.positions[at] : at];
  }
  const int64_t first = c0 / kBlock, blocks = (c1 - c0) / kBlock;
  const auto step = [&](int64_t b, int count) __attribute__((always_inline)) {
    Coefficients co;
    load_coefficients<F>(rows, first + b, first + b + count - 1, h, &co);
    for (int i = 0; i < count; ++i) {
      float* acc = job.acc + (b + i) * kBlock;
      Vec sum[kBlock / kLanes];
#pragma GCC unroll 8
      for (int v = 0; v < kBlock / kLanes; ++v) sum[v] = load(acc + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec w[kBlock / kLanes];
        load_numbers<F>(part_at<F>(rows[r], first + b + i), w);
        add_numbers<F>(w, co.first[4 * i + r], co.second[4 * i + r], co.least[4 * i + r], sum);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kBlock / kLanes; ++v) store(acc + v * kLanes, sum[v]);
    }
  };
  constexpr int kStepBytes = 4 * kBlock * kFormatInfo[F].block_bytes / kFormatInfo[F].block;
  for_steps<true, kStepBytes>(tile, bytes_of<F>(c0), blocks / 4,
                              [&](int64_t s) __attribute__((always_inline)) { step(4 * s, 4); });
  if (blocks % 4) step(blocks / 4 * 4, static_cast<int>(blocks % 4));
}

template <Format F>
static void add_scaled(const AxpyJob& job, int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
  if constexpr (!is_integer(F)) {
    axpy<F>(job, k0, k1, 0, 1, c0, c1);
  } else {
    AxpyJob rest = job;
#ifdef THERMOCLINE_LANES
    const int64_t done = add_by_lanes<F>(job, k0, k1, c0, c1);
    if (done == c1 - c0) return;
    rest.acc += done;
    c0 += done;
#endif
    int64_t k = k0;
    for (; k + 4 <= k1; k += 4) add_scaled_tile<F, 4>(rest, k, k1, c0, c1);
    if (k1 - k == 3) add_scaled_tile<F, 3>(rest, k, k1, c0, c1);
    if (k1 - k == 2) add_scaled_tile<F, 2>(rest, k, k1, c0, c1);
    if (k1 - k == 1) add_scaled_tile<F, 1>(rest, k, k1, c0, c1);
  }
}

// Rows k0 .. k1 of kListColumns columns or fewer, from c0 on: their numbers, and what belongs to every 16 of
// them.
template <Format F>
static void unpack(const Rows& rows, int64_t k0, int64_t k1, int64_t c0, int64_t c1, const ListTile& to) {
  if constexpr (!is_integer(F)) {
    dequantize<F>(rows, k0, k1, c0, c1, to.numbers, kListColumns);
  } else {
    for (int64_t k = k0; k < k1; ++k) {
      float* numbers = to.numbers + (k - k0) * kListColumns;
      float* scales = to.scales + (k - k0) * kListParts;
      float* minima = to.minima + (k - k0) * kListParts;
      for (int64_t c = c0; c < c1; c += kBlock, numbers += kBlock, scales += 2, minima += 2) {
        const Part<F> at = part_at<F>(row_at(rows, k), c / kBlock);
        Vec w[kBlock / kLanes];
        load_numbers<F>(at, w);
        for (int v = 0; v < kBlock / kLanes; ++v) store(numbers + v * kLanes, w[v]);
        const PartScales s = part_scales<F>(at);
        scales[0] = s.scale[0];
        scales[1] = s.scale[F == kQ6_K];
        if constexpr (has_minima(F)) minima[0] = minima[1] = s.least;
      }
    }
  }
}

template <Format F>
static int32_t add_listed(const ListJob& job, int32_t next, float* acc) {
  constexpr int kVecs = 8, kColumns = kVecs * kLanes;
  int32_t end = next;
  for (int c = 0; c < kListColumns; c += kColumns) {
    Vec sum[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[v] = load(acc + c + v * kLanes);
    for (end = next; job.list[end] < job.k1; ++end) {
      const int64_t k = job.list[end], place = k - job.k0;
      const float h = job.h[job.positions[k]];
      const float* row = job.tile.numbers + place * kListColumns + c;
      if constexpr (!is_integer(F)) {
        const Vec factor = splat(h);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[v] = fma(factor, load(row + v * kLanes), sum[v]);
      } else {
        const float *scales = job.tile.scales + place * kListParts,
                    *minima = job.tile.minima + place * kListParts;
        float scale[kListParts], least[kListParts];
        for (int i = 0; i < kListParts; ++i) scale[i] = scales[i] * h;
        if constexpr (has_minima(F)) {
          for (int i = 0; i < kListParts; ++i) least[i] = minima[i] * h;
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const int part = (c + v * kLanes) / 16;
          sum[v] = fma(load(row + v * kLanes), splat(scale[part]), sum[v]);
          if constexpr (has_minima(F)) sum[v] = sub(sum[v], splat(least[part]));
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(acc + c + v * kLanes, sum[v]);
  }
  return end;
}
