// The rows of a tile of a weighted sum.

static inline int64_t sum_place(const SumJob& job, int64_t k) { return job.list ? job.list[k] : k; }

// Those in places k .. k + R; in place of those past the last, of which `end` is one after, this.
template <int R>
static inline void find_sums(const SumJob& job, int64_t k, int64_t end, int64_t limit, RowTile<R>& tile) {
  const auto row = [&](int64_t at) {
    const int64_t place = sum_place(job, at);
    return job.rows.ids ? job.rows.ids[place] : place;
  };
  for (int i = 0; i < R; ++i)
    tile.now[i] = job.rows.base + row(k + i < end ? k + i : end - 1) * job.rows.row_bytes;
  find_next<R, false>(job.rows, k, limit, !job.list && !job.rows.ids, row, tile.next);
}

// What row k is to be multiplied with, in units of the token.
static inline double weight_of(const SumJob& job, int64_t k) {
  const int64_t place = sum_place(job, k);
  return static_cast<double>(job.h[job.positions ? job.positions[place] : place]);
}

// A factor that a zero scale meets may be of any size.
constexpr double kMostFactor = 1e30;
