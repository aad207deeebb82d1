// Where the rows of a tile lie.

static inline const uint8_t* row_at(const Rows& rows, int64_t r) {
  return rows.base + (rows.ids ? rows.ids[r] : r) * rows.row_bytes;
}

// Where column c of a row begins, or its block.
template <Format F>
static inline int64_t bytes_of(int64_t c) {
  return c / kFormatInfo[F].block * kFormatInfo[F].block_bytes;
}

// What a tile reads: R rows, and the rows that are fetched meanwhile: of the tile after it or, where rows are
// short, of the one after that, for memory answers late.
constexpr int64_t kAhead = 8192;

// Rows of floats that lie apart are long: they are always brought two tiles ahead, and to the second cache,
// for the first one has no room for so many.
template <Format F>
constexpr bool kLongRows = !is_integer(F);

// Where all rows are wanted, what lies so much further is brought to the second cache: it has room for more
// lines on their way than the first one, whose prefetches then find them there.
constexpr int64_t kFarAhead = 16384;

template <int R>
struct RowTile {
  const uint8_t* now[R];
  const uint8_t* next[R];
  bool scattered;  // the next rows are not neighbours
  int64_t far;     // bytes from them to what is fetched for later
};

// kFarAhead if all rows are wanted as far as that from row r on, else 0.
static inline int64_t far_from(const Rows& rows, int64_t r, int64_t limit) {
  if (!rows.ids) return kFarAhead;
  const int64_t end = r + 2 * kFarAhead / rows.row_bytes;
  return end < limit && rows.ids[end] - rows.ids[r] == end - r ? kFarAhead : 0;
}

template <int R, bool Long>
static inline RowTile<R> row_tile(const Rows& rows, int64_t r, int64_t end) {
  const int64_t limit = end > rows.count ? end : rows.count;
  RowTile<R> tile;
  for (int i = 0; i < R; ++i) {
    tile.now[i] = row_at(rows, r + i);
    const int64_t next = r + i + (Long || R * rows.row_bytes < kAhead ? 2 * R : R);
    tile.next[i] = row_at(rows, next < limit ? next : r + i);
  }
  tile.scattered = tile.next[R - 1] != tile.next[0] + (R - 1) * rows.row_bytes;
  tile.far = far_from(rows, r, limit);
  return tile;
}

// step(s) for all steps, which read kStepBytes of every row of a tile. If FETCH, the next tile is fetched
// meanwhile: where rows are neighbours one after another, so that memory sees a single stream, and else side
// by side, so that several of its banks answer at once.
template <bool Fetch, bool Long, int kStepBytes, int R, class Step>
static inline void for_steps(const RowTile<R>& tile, int64_t offset, int64_t steps, Step step) {
  constexpr int kLine = 64;
  if constexpr (!Fetch) {
    for (int64_t s = 0; s < steps; ++s) step(s);
    return;
  }
  if (tile.scattered) {
    int64_t at = 0;
    for (int64_t s = 0; s < steps; ++s) {
      for (; at < (s + 1) * kStepBytes; at += kLine) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(tile.next[r] + offset + at, 0, Long ? 2 : 3);
      }
      step(s);
    }
    return;
  }
  int64_t s = 0;
  for (int r = 0; r < R; ++r) {
    const uint8_t* ahead = tile.next[r] + offset;
    for (const int64_t end = steps * (r + 1) / R; s < end; ++s) {
#pragma GCC unroll 16
      for (int i = 0; i < R * kStepBytes; i += kLine) {
        __builtin_prefetch(ahead + tile.far + i, 0, 2);
        __builtin_prefetch(ahead + i);
      }
      ahead += R * kStepBytes;
      step(s);
    }
  }
}
