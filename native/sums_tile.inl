// The rows of a tile of a weighted sum, with their factors.

template <int R>
struct SumTile {
  RowTile<R> rows;
  float factor[R], least[R];  // 0 for rows past the last, in whose place the last is read
};

// A factor that a zero scale meets may be of any size.
static inline float factor_of(double h, double per_unit) {
  constexpr double kMost = 1e30;
  const double factor = h * per_unit;
  return static_cast<float>(factor > kMost ? kMost : factor < -kMost ? -kMost : factor);
}

template <int R>
static inline SumTile<R> sum_tile(const SumJob& job, int64_t k, int64_t end, int64_t limit) {
  const auto place = [&](int64_t at) { return job.list ? job.list[at] : at; };
  const int64_t ahead = R * job.rows.row_bytes < kAhead ? 2 * R : R;
  SumTile<R> tile;
  for (int i = 0; i < R; ++i) {
    const int64_t at = k + i < end ? k + i : end - 1, now = place(at);
    tile.rows.now[i] = row_at(job.rows, now);
    tile.rows.next[i] = at + ahead < limit ? row_at(job.rows, place(at + ahead)) : tile.rows.now[i];
    const double h = k + i < end ? job.h[job.positions ? job.positions[now] : now] : 0.0;
    tile.factor[i] = factor_of(h, job.per_factor);
    tile.least[i] = factor_of(h, job.per_least);
  }
  tile.rows.far = job.list ? 0 : far_from(job.rows, k, limit);
  tile.rows.scattered = tile.rows.next[R - 1] != tile.rows.next[0] + (R - 1) * job.rows.row_bytes;
  return tile;
}
