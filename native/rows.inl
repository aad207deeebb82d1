// Where the rows of a tile lie.

static inline const uint8_t* row_at(const Rows& rows, int64_t r) {
  return rows.base + (rows.ids ? rows.ids[r] : r) * rows.row_bytes;
}

// What a tile reads: R rows, and the rows of the tile after it, which are fetched ahead if FETCH.
template <int R>
struct RowTile {
  const uint8_t* now[R];
  const uint8_t* next[R];
};

template <int R>
static inline RowTile<R> row_tile(const Rows& rows, int64_t r, int64_t end) {
  RowTile<R> tile;
  for (int i = 0; i < R; ++i) {
    tile.now[i] = row_at(rows, r + i);
    tile.next[i] = row_at(rows, r + R + i < end ? r + R + i : r + i);
  }
  return tile;
}

// Random rows are fetched ahead up to this many bytes each; past that the hardware follows a row by itself,
// and more would push the current rows out of the first cache.
constexpr int64_t kFetchBytes = 4096;
