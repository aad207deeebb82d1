// What panels do across the lanes of vectors of 256 bits.

// Lane i of vector j becomes lane j of vector i.
static inline void transpose(__m256i (&v)[8]) {
  __m256i t[8], s[8];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    t[2 * k] = _mm256_unpacklo_epi32(v[2 * k], v[2 * k + 1]);
    t[2 * k + 1] = _mm256_unpackhi_epi32(v[2 * k], v[2 * k + 1]);
  }
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4) {
    s[k] = _mm256_unpacklo_epi64(t[k], t[k + 2]);
    s[k + 1] = _mm256_unpackhi_epi64(t[k], t[k + 2]);
    s[k + 2] = _mm256_unpacklo_epi64(t[k + 1], t[k + 3]);
    s[k + 3] = _mm256_unpackhi_epi64(t[k + 1], t[k + 3]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    v[m] = _mm256_permute2x128_si256(s[m], s[4 + m], 0x20);
    v[4 + m] = _mm256_permute2x128_si256(s[m], s[4 + m], 0x31);
  }
}

static inline Int bits_of(Vec v) { return _mm256_castps_si256(v); }

// The first n lanes.
template <int n>
static inline void store_first(float* to, Int v) {
  static_assert(n == 4 || n == 8);
  if constexpr (n == 8) {
    store(to, _mm256_castsi256_ps(v));
  } else {
    _mm_storeu_ps(to, _mm_castsi128_ps(_mm256_castsi256_si128(v)));
  }
}

// The sums of up to a vector of rows, r to r1, and tokens t0 .. t0 + count, `stride` vectors apart, to their
// places.
static inline void store_rows(const DotJob& job, const Vec* sums, int64_t stride, int64_t r, int64_t r1,
                              int64_t t0, int64_t count) {
  const int64_t rows = r1 - r < kLanes ? r1 - r : kLanes;
  for (int64_t t = 0; t < count && rows > 0; ++t) {
    float values[kLanes];
    store(values, sums[t * stride]);
    float* out = job.out + (t0 + t) * job.out_stride + r;
    for (int64_t i = 0; i < rows; ++i) {
      const float value = job.bias ? values[i] + job.bias[r + i] : values[i];
      out[i] = job.add ? out[i] + value : value;
    }
  }
}
