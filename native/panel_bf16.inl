// Panels of BF16 as it is stored, for tokens rounded to BF16: the products of two columns are added in one
// instruction. Numbers below the smallest normal one count as zero.

static int64_t bf16_panel_bytes(int64_t columns) { return (columns + 1) / 2 * kPanelRows * 4; }

static void pack_bf16(const Rows& rows, int64_t r0, int64_t r1, int64_t columns, uint8_t* panel) {
  const int64_t pairs = (columns + 1) / 2;
  for (int v = 0; v < kPanelVecs; ++v) {
    const PanelLanes lanes(rows, r0, r1, v);
    for (int64_t p = 0; p < pairs; p += kLanes) {
      const int64_t left = columns - 2 * p;
      const __mmask32 mask = left >= 32 ? 0xFFFFFFFF : (1u << left) - 1;
      __m512i w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) w[i] = _mm512_maskz_loadu_epi16(mask, lanes.row[i] + 4 * p);
      transpose(w);
      const int64_t end = pairs - p < kLanes ? pairs - p : kLanes;
      for (int64_t i = 0; i < end; ++i)
        _mm512_storeu_si512(panel + ((p + i) * kPanelVecs + v) * static_cast<int64_t>(sizeof(Vec)), w[i]);
    }
  }
}

// To the nearest, ties to even; one past the last of an odd number is zero.
static void round_tokens(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const __mmask16 mask = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1 << left) - 1);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i));
    __m256i bits;
    memcpy(&bits, &rounded, sizeof bits);
    _mm256_mask_storeu_epi16(out + i, mask, bits);
  }
  if (n % 2) out[n] = 0;
}

static inline __m512bh as_bf16(__m512i bits) {
  __m512bh v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <int T>
static void bf16_panel_tile(const DotJob& job, const uint8_t* w, int64_t r0, int64_t r1, int64_t t0) {
  const int64_t pairs = (job.columns + 1) / 2;
  const uint16_t* x = job.tokens.rounded + t0 * 2 * pairs;
  Vec sums[T][kPanelVecs];
  clear<T>(sums);
  for (int64_t p = 0; p < pairs; ++p, w += kPanelRows * 4) {
    const __m512bh w0 = as_bf16(_mm512_loadu_si512(w)), w1 = as_bf16(_mm512_loadu_si512(w + sizeof(Vec)));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512bh now =
          as_bf16(_mm512_set1_epi32(load_int(reinterpret_cast<const uint8_t*>(x + 2 * (t * pairs + p)))));
      sums[t][0] = _mm512_dpbf16_ps(sums[t][0], w0, now);
      sums[t][1] = _mm512_dpbf16_ps(sums[t][1], w1, now);
    }
  }
  store_sums(job, sums[0], r0, r1, t0, T);
}

static void bf16_panel_dot(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
                           uint8_t*) {
  int64_t t = 0;
  for (; t + 12 <= tokens; t += 12) bf16_panel_tile<12>(job, panel, r0, r1, t);
  for (; t + 4 <= tokens; t += 4) bf16_panel_tile<4>(job, panel, r0, r1, t);
  for (; t < tokens; ++t) bf16_panel_tile<1>(job, panel, r0, r1, t);
}
