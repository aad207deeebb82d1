// Sums of scaled rows. R rows are added in one sweep, so that an accumulator is loaded and stored once for R
// rows; each element still receives its rows one after another in ascending order.

// Columns that are unpacked together: a vector, or a block.
template <Format F>
constexpr int kUnit = is_integer(F) ? kBlock : kLanes;

template <Format F>
static inline void load_unit(const uint8_t* row, int64_t c, Vec (&w)[kUnit<F> / kLanes]) {
  if constexpr (is_integer(F)) {
    load_block<F>(part_at<F>(row, c / kBlock), w);
  } else {
    w[0] = load_row<F>(row, c);
  }
}

template <Format F, int R>
static inline void axpy_one(const RowTile<R>& tile, const float* const (&h)[R], int64_t c0, int64_t c1,
                            float* acc) {
  constexpr int kVecs = kUnit<F> / kLanes;
  Vec scale[R];
  for (int r = 0; r < R; ++r) scale[r] = splat(*h[r]);
  const auto add_unit = [&](int64_t c) __attribute__((always_inline)) {
    Vec sum[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[v] = load(acc + c - c0 + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec w[kVecs];
      load_unit<F>(tile.now[r], c, w);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[v] = fma(scale[r], w[v], sum[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(acc + c - c0 + v * kLanes, sum[v]);
  };
  constexpr int kStep = 4 * kBlock, kStepBytes = kStep * kFormatInfo[F].block_bytes / kFormatInfo[F].block;
  const int64_t steps = (c1 - c0) / kStep;
  for_steps<kLongRows<F>, kStepBytes, R>(tile.next, bytes_of<F>(c0), steps,
                                         [&](int64_t s) __attribute__((always_inline)) {
                                           for (int u = 0; u < kStep; u += kUnit<F>)
                                             add_unit(c0 + s * kStep + u);
                                         });
  int64_t c = c0 + steps * kStep;
  for (; c + kUnit<F> <= c1; c += kUnit<F>) add_unit(c);
  if constexpr (!is_integer(F)) {
    for (; c < c1; ++c) {
      for (int r = 0; r < R; ++r) acc[c - c0] = fma_one(*h[r], load_one<F>(tile.now[r], c), acc[c - c0]);
    }
  }
}

template <Format F, int R>
static inline void axpy_many(const AxpyJob& job, const RowTile<R>& tile, const float* const (&h)[R],
                             int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
  constexpr int kVecs = kUnit<F> / kLanes;
  int64_t c = c0;
  for (; c + kUnit<F> <= c1; c += kUnit<F>) {
    Vec w[R][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) load_unit<F>(tile.now[r], c, w[r]);
    for (int64_t t = t0; t < t1; ++t) {
      float* acc = job.acc + t * job.acc_stride + c - c0;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        Vec sum = load(acc + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum = fma(splat(h[r][t * job.h_stride]), w[r][v], sum);
        store(acc + v * kLanes, sum);
      }
    }
  }
  if constexpr (!is_integer(F)) {
    for (; c < c1; ++c) {
      for (int64_t t = t0; t < t1; ++t) {
        float* acc = job.acc + t * job.acc_stride + c - c0;
        for (int r = 0; r < R; ++r) *acc = fma_one(h[r][t * job.h_stride], load_one<F>(tile.now[r], c), *acc);
      }
    }
  }
}

template <Format F, int R>
static void axpy_rows(const AxpyJob& job, int64_t k, int64_t end, int64_t t0, int64_t t1, int64_t c0,
                      int64_t c1) {
  RowTile<R> tile;
  find_tile<R, kLongRows<F>>(job.rows, k, end, tile);
  const float* h[R];
  for (int r = 0; r < R; ++r) h[r] = job.h + (job.positions ? job.positions[k + r] : k + r);
  if (t1 - t0 > 1) return axpy_many<F, R>(job, tile, h, t0, t1, c0, c1);
  for (int r = 0; r < R; ++r) h[r] += t0 * job.h_stride;
  axpy_one<F, R>(tile, h, c0, c1, job.acc + t0 * job.acc_stride);
}

// Neighbours in floats that are left to the processor's own prefetching are read in one stream.
template <Format F>
static inline bool one_by_one(const AxpyJob& job, int64_t k) {
  if (is_integer(F) || job.rows.fetching != kToSecond) return false;
  return !job.rows.ids || job.rows.ids[k + kAxpyRows - 1] - job.rows.ids[k] == kAxpyRows - 1;
}

template <Format F>
static void axpy(const AxpyJob& job, int64_t k0, int64_t k1, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
  int64_t k = k0;
  for (; k + kAxpyRows <= k1; k += kAxpyRows) {
    if (t1 - t0 == 1 && one_by_one<F>(job, k)) {
      for (int r = 0; r < kAxpyRows; ++r) axpy_rows<F, 1>(job, k + r, k1, t0, t1, c0, c1);
    } else {
      axpy_rows<F, kAxpyRows>(job, k, k1, t0, t1, c0, c1);
    }
  }
  for (; k + 2 <= k1; k += 2) axpy_rows<F, 2>(job, k, k1, t0, t1, c0, c1);
  for (; k < k1; ++k) axpy_rows<F, 1>(job, k, k1, t0, t1, c0, c1);
}

template <Format F>
static void dequantize(const Rows& rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1, float* out,
                       int64_t out_stride) {
  constexpr int kVecs = kUnit<F> / kLanes;
  for (int64_t r = r0; r < r1; ++r) {
    const uint8_t* row = row_at(rows, r);
    float* to = out + (r - r0) * out_stride;
    int64_t c = c0;
    for (; c + kUnit<F> <= c1; c += kUnit<F>) {
      Vec w[kVecs];
      load_unit<F>(row, c, w);
      for (int v = 0; v < kVecs; ++v) store(to + c - c0 + v * kLanes, w[v]);
    }
    if constexpr (!is_integer(F)) {
      for (; c < c1; ++c) to[c - c0] = load_one<F>(row, c);
    }
  }
}

static int32_t add_listed(const ListJob& job, int32_t next, float* acc) {
  constexpr int kVecs = 8, kColumns = kVecs * kLanes;
  int32_t end = next;
  for (int c = 0; c < kListColumns; c += kColumns) {
    Vec sum[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[v] = load(acc + c + v * kLanes);
    for (end = next; job.list[end] < job.k1; ++end) {
      const int64_t k = job.list[end];
      const Vec factor = splat(job.h[job.positions[k]]);
      const float* row = job.numbers + (k - job.k0) * kListColumns + c;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[v] = fma(factor, load(row + v * kLanes), sum[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(acc + c + v * kLanes, sum[v]);
  }
  return end;
}
