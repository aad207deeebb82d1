// Where the rows of a tile lie.

static inline const uint8_t* row_at(const Rows& rows, int64_t r) {
  return rows.base + (rows.ids ? rows.ids[r] : r) * rows.row_bytes;
}

// Where column c of a row begins, or its block.
template <Format F>
static inline int64_t bytes_of(int64_t c) {
  return c / kFormatInfo[F].block * kFormatInfo[F].block_bytes;
}

// Rows of floats are long: where they lie apart they are brought to the second cache, for the first one has
// no room for so many.
template <Format F>
constexpr bool kLongRows = !is_integer(F);

// Rows that are multiplied about as fast as memory brings them: lines that are still on their way then take
// the place of others in the first cache's queue, where the second one has room.
template <Format F>
constexpr bool kQuickRows = F == kQ4_0 || is_arranged(F);

// Rows that lie apart are fetched so many at a time, the same line of each, then the next: a processor's own
// prefetching follows each page by itself, and several banks of the memory answer at once. To the second
// cache half as many will do, two tiles ahead.
constexpr int kSideBySide = 8;

// Neighbours are fetched one tile ahead, or two where a tile is shorter than this; and what lies so much
// further is brought to the second cache, if all rows are wanted as far as that: it has room for more lines
// on their way than the first one, whose prefetches then find them there.
constexpr int64_t kAhead = 8192, kFarAhead = 16384;

// What is fetched while a tile is worked on: lines of the neighbours that follow; of rows that lie apart, the
// same lines of several; or nothing.
enum class Next { kNeighbours, kLines, kNothing };

struct NextRows {
  Next what;
  const uint8_t* first;  // the neighbours', where the tile after it or the one after that begins
  int64_t row_bytes;
  bool far;        // what lies kFarAhead further is wanted too
  int count;       // of rows that lie apart
  int begin, end;  // the parts of their lines, as many as rows, that this tile fetches
  bool second;     // all of it to the second cache
  const uint8_t* rows[kSideBySide];
};

template <int R>
struct RowTile {
  const uint8_t* now[R];
  NextRows next;
};

// What is fetched with the rows in places k .. k + R of `limit`; place(k) says which row is there. `all`: it
// is row k.
template <int R, bool Long, class Place>
static inline void find_next(const Rows& rows, int64_t k, int64_t limit, bool all, Place place,
                             NextRows& next) {
  next.row_bytes = rows.row_bytes;
  const int64_t after = k + (Long || R * rows.row_bytes < kAhead ? 2 * R : R);
  const auto run = [&](int64_t from, int64_t to) {
    return to < limit && place(to) - place(from) == to - from;
  };
  if (all || run(after, after + R - 1)) {
    next.what = Long && R == 1 && rows.fetching == kToSecond ? Next::kNothing : Next::kNeighbours;
    next.first = rows.base + (all ? after : place(after)) * rows.row_bytes;
    next.far = all || run(k, k + 2 * kFarAhead / rows.row_bytes);
    next.count = next.begin = next.end = 0;
    next.second = false;
    return;
  }
  next.what = Next::kLines;
  next.first = nullptr;
  next.far = false;
  next.second = Long || rows.fetching == kToSecond;
  const bool half = rows.fetching == kToSecond && R <= kSideBySide / 2;
  next.count = half ? kSideBySide / 2 : kSideBySide;
  next.begin = static_cast<int>(k & (next.count - 1));
  next.end = next.begin + R < next.count ? next.begin + R : next.count;
  const int64_t from = k - next.begin + (half ? 2 : 1) * next.count;
  for (int i = 0; i < next.count; ++i)
    next.rows[i] = rows.base + place(from + i < limit ? from + i : k) * rows.row_bytes;
}

// Written in place, here as elsewhere: a copy would wait until all that was stored before has reached the
// cache.
template <int R, bool Long>
static inline void find_tile(const Rows& rows, int64_t r, int64_t end, RowTile<R>& tile) {
  const int64_t limit = end > rows.count ? end : rows.count;
  for (int i = 0; i < R; ++i) tile.now[i] = row_at(rows, r + i);
  const auto place = [&](int64_t k) { return rows.ids ? rows.ids[k] : k; };
  find_next<R, Long>(rows, r, limit, !rows.ids, place, tile.next);
}

// Instead of the lines `from` .. `to` of some pages, as many of the pages after them, by turns: for short
// rows, several of which lie in a page.
static inline void fetch_by_turns(const uint8_t* from, const uint8_t* to) {
  constexpr uintptr_t kPage = 4096, kPages = kFarAhead / kPage, kTurn = kPages * 64;
  const auto end = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t at = (reinterpret_cast<uintptr_t>(from) + kTurn - 1) / kTurn * kTurn; at < end;
       at += kTurn) {
    const uintptr_t window = at / kFarAhead * kFarAhead, line = (at - window) / kPages;
    const auto* next = reinterpret_cast<const uint8_t*>(window + kFarAhead + line);
#pragma GCC unroll 4
    for (uintptr_t page = 0; page < kPages; ++page) __builtin_prefetch(next + page * kPage, 0, 2);
  }
}

// step(s) for all steps, which read kStepBytes of every row of a tile from `offset` on, while its next rows
// are fetched.
template <bool Long, int kStepBytes, int R, class Step>
[[gnu::always_inline]] static inline void for_steps(const NextRows& next, int64_t offset, int64_t steps,
                                                    Step step) {
  constexpr int kLine = 64;
  if (next.what == Next::kNothing) {
    for (int64_t s = 0; s < steps; ++s) step(s);
    return;
  }
  if (next.what == Next::kLines) {
    const int64_t lines = (steps * kStepBytes + kLine - 1) / kLine;
    const bool half = next.count < kSideBySide;  // numbers that are known need no division
    const auto part = [&](int64_t n) { return half ? 2 * n / kSideBySide : n / kSideBySide; };
    const int64_t begin = part(lines * next.begin), end = part(lines * next.end);
    int64_t at = offset + begin * kLine, due = 0;
    for (int64_t s = 0; s < steps; ++s) {
      for (due += end - begin; due > 0; due -= steps, at += kLine) {
        if (next.second) {
          for (int i = 0; i < next.count; ++i) __builtin_prefetch(next.rows[i] + at, 0, 2);
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kSideBySide; ++i) __builtin_prefetch(next.rows[i] + at, 0, 3);
        }
      }
      step(s);
    }
    return;
  }
  const bool turns = next.far && next.row_bytes - steps * kStepBytes < kStepBytes;
  const int64_t far = next.far ? kFarAhead : 0;
  int64_t s = 0;
  for (int r = 0; r < R; ++r) {
    const uint8_t* ahead = next.first + r * next.row_bytes + offset;
    for (const int64_t end = steps * (r + 1) / R; s < end; ++s) {
      if (!Long && turns) fetch_by_turns(ahead, ahead + R * kStepBytes);
      if (!Long && next.second) {
#pragma GCC unroll 16
        for (int i = 0; i < R * kStepBytes; i += kLine) __builtin_prefetch(ahead + i, 0, 2);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < R * kStepBytes; i += kLine) {
          if constexpr (Long) __builtin_prefetch(ahead + far + i, 0, 2);
          __builtin_prefetch(ahead + i);
        }
      }
      ahead += R * kStepBytes;
      step(s);
    }
  }
}
