// Products of a batch of tokens. The weights of kPanelRows rows are unpacked once, into a panel whose vectors
// hold a unit of columns (four bytes: a float, two BF16 numbers or four 8-bit numbers) of sixteen rows each.
// A unit of a token, spread over all lanes, then meets sixteen rows at once, and nothing is summed across
// lanes.

constexpr int kPanelVecs = kPanelRows / kLanes;
static_assert(kPanelVecs == 2 && kLanes == 16);

// Lane i of vector j becomes lane j of vector i.
static inline void transpose(__m512i (&v)[16]) {
  __m512i t[16], s[16];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    t[2 * k] = _mm512_unpacklo_epi32(v[2 * k], v[2 * k + 1]);
    t[2 * k + 1] = _mm512_unpackhi_epi32(v[2 * k], v[2 * k + 1]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 16; k += 4) {
    s[k] = _mm512_unpacklo_epi64(t[k], t[k + 2]);
    s[k + 1] = _mm512_unpackhi_epi64(t[k], t[k + 2]);
    s[k + 2] = _mm512_unpacklo_epi64(t[k + 1], t[k + 3]);
    s[k + 3] = _mm512_unpackhi_epi64(t[k + 1], t[k + 3]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    const __m512i a = _mm512_shuffle_i32x4(s[m], s[4 + m], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(s[8 + m], s[12 + m], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(s[m], s[4 + m], 0xEE);
    const __m512i d = _mm512_shuffle_i32x4(s[8 + m], s[12 + m], 0xEE);
    v[m] = _mm512_shuffle_i32x4(a, b, 0x88);
    v[4 + m] = _mm512_shuffle_i32x4(a, b, 0xDD);
    v[8 + m] = _mm512_shuffle_i32x4(c, d, 0x88);
    v[12 + m] = _mm512_shuffle_i32x4(c, d, 0xDD);
  }
}

// The sixteen rows of vector v of a panel; the last row again in place of those past the end, whose sums are
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

// The sums of up to a vector of rows, r to r1, and tokens t0 .. t0 + count, `stride` vectors apart, to their
// places.
static inline void store_rows(const DotJob& job, const Vec* sums, int64_t stride, int64_t r, int64_t r1,
                              int64_t t0, int64_t count) {
  const int64_t left = r1 - r;
  if (left <= 0) return;
  const __mmask16 mask = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1 << left) - 1);
  const Vec bias = job.bias ? _mm512_maskz_loadu_ps(mask, job.bias + r) : zero();
  for (int64_t t = 0; t < count; ++t) {
    float* out = job.out + (t0 + t) * job.out_stride + r;
    const Vec sum = sums[t * stride], value = job.bias ? add(sum, bias) : sum;
    _mm512_mask_storeu_ps(out, mask, job.add ? add(_mm512_maskz_loadu_ps(mask, out), value) : value);
  }
}

// The sums (count, kPanelVecs) of rows r0 .. r1.
static inline void store_sums(const DotJob& job, const Vec* sums, int64_t r0, int64_t r1, int64_t t0,
                              int64_t count) {
  for (int v = 0; v < kPanelVecs; ++v) store_rows(job, sums + v, kPanelVecs, r0 + v * kLanes, r1, t0, count);
}
