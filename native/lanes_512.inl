// What panels do across the lanes of vectors of 512 bits.

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

static inline Int bits_of(Vec v) { return _mm512_castps_si512(v); }

// The first n lanes.
template <int n>
static inline void store_first(float* to, Int v) {
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1 << n) - 1), v);
}

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
