// Products of a batch of tokens. The weights of kPanelRows rows are unpacked once, into a panel whose vectors
// hold a unit of columns (four bytes: a float, two BF16 numbers or four 8-bit numbers) of a row in each lane.
// A unit of a token, spread over all lanes, then meets so many rows at once, and nothing is summed across
// lanes.

constexpr int kPanelVecs = kPanelRows / kLanes;

// The rows of vector v of a panel; the last row again in place of those past the end, whose sums are
// not stored.
struct PanelLanes {
  const uint8_t* row[kLanes];
  PanelLanes(const Rows& rows, int64_t r0, int64_t r1, int v) {
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = r0 + v * kLanes + i;
      row[i] = row_at(rows, r < r1 ? r : r1 - 1);
    }
  }
};

template <int T>
static inline void clear(Vec (&sums)[T][kPanelVecs]) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = zero();
}

// Adds up the sums of passes as a tree, pairs of neighbours first, as they come.
template <int T, int kLevels, int V = kPanelVecs>
struct PassTree {
  Vec waiting[kLevels + 1][T][V];

  void put(int pass, const Vec (&sums)[T][V]) {
    Vec now[T][V];
    memcpy(now, sums, sizeof now);
    int level = 0;
    for (; pass >> level & 1; ++level) {
      for (int t = 0; t < T; ++t) {
        for (int v = 0; v < V; ++v) now[t][v] = add(waiting[level][t][v], now[t][v]);
      }
    }
    memcpy(waiting[level], now, sizeof now);
  }
  const Vec (&total() const)[T][V] { return waiting[kLevels]; }
};

// The sums (count, kPanelVecs) of rows r0 .. r1.
static inline void store_sums(const DotJob& job, const Vec* sums, int64_t r0, int64_t r1, int64_t t0,
                              int64_t count) {
  for (int v = 0; v < kPanelVecs; ++v) store_rows(job, sums + v, kPanelVecs, r0 + v * kLanes, r1, t0, count);
}
