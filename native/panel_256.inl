// Panels of integer formats in vectors of 256 bits. Of a block of 32 columns a panel holds eight units of 32
// rows, with numbers as the quads have them; scales; minima. Passes and their sums are those of
// panel_int.inl.

constexpr int kIntPasses = 4;
constexpr int64_t kVecBytes = sizeof(Vec);
constexpr int64_t kUnitBytes = kPanelVecs * kVecBytes;

// Parts of a block with a scale each.
template <Format F>
constexpr int kHalves = is_q6_k(F) ? 2 : 1;
template <Format F>
constexpr int64_t kPanelBlock = (8 + kHalves<F> + (has_minima(F) ? 1 : 0)) * kUnitBytes;

template <Format F>
static int64_t int_panel_bytes(int64_t columns) {
  return columns / kBlock * kPanelBlock<F>;
}

// The rows of vector v of a block.
template <Format F>
static inline void pack_units(const PanelLanes& lanes, int64_t b, int v, uint8_t* to) {
  __m256i units[8];
  float scale[2][kLanes], least[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) {
    const Part<F> at = part_at<F>(lanes.row[i], b);
    units[i] = _mm256_add_epi8(numbers<F>(at), _mm256_set1_epi8(static_cast<char>(kUnsigned<F>)));
    const PartScales s = part_scales<F>(at);
    scale[0][i] = s.scale[0];
    scale[1][i] = s.scale[1];
    least[i] = s.least;
  }
  transpose(units);
  to += v * kVecBytes;
  for (int j = 0; j < 8; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * kUnitBytes), units[j]);
  uint8_t* rest = to + 8 * kUnitBytes;
  for (int h = 0; h < kHalves<F>; ++h, rest += kUnitBytes) memcpy(rest, scale[h], sizeof scale[h]);
  if constexpr (has_minima(F)) memcpy(rest, least, sizeof least);
}

template <Format F>
static void pack_ints(const Rows& rows, int64_t r0, int64_t r1, int64_t columns, uint8_t* panel) {
  for (int v = 0; v < kPanelVecs; ++v) {
    const PanelLanes lanes(rows, r0, r1, v);
    uint8_t* to = panel;
    for (int pass = 0; pass < kIntPasses; ++pass) {
      for (int64_t b = pass; b < columns / kBlock; b += kIntPasses, to += kPanelBlock<F>)
        pack_units<F>(lanes, b, v, to);
    }
  }
}

// A tile of tokens meets kTileVecs vectors of rows at a time: sums of products and of pairs of them, weights
// and a token's unit fill the 16 registers.
constexpr int kTileVecs = 2;

// Units whose pairs of products fit 16 bits when they are summed.
template <Format F>
constexpr int kPairUnits = F == kQ8_0   ? 1
                           : is_q6_k(F) ? 2
                           : is_q5_k(F) ? 4
                                        : 8;

// Tokens of a tile: fewer where sums of pairs and of fours are both kept.
template <Format F>
constexpr int kTileRows = !kVnni && (is_q5_k(F) || is_q6_k(F)) ? 2 : 4;

// Products of units j0 to j1 of a block of weights at `w` with as many tokens.
template <Format F, int T>
static inline void multiply(const uint8_t* w, const int8_t* q, int64_t q_stride, int j0, int j1,
                            __m256i (&whole)[T][kTileVecs]) {
  const auto unit = [&](int j, int v) { return load_256(w + j * kUnitBytes + v * kVecBytes); };
  const auto token = [&](int t, int j) {
    return _mm256_set1_epi32(load_int(reinterpret_cast<const uint8_t*>(q + t * q_stride + 4 * j)));
  };
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < kTileVecs; ++v) whole[t][v] = _mm256_setzero_si256();
  }
#ifdef THERMOCLINE_VNNI
#pragma GCC unroll 8
  for (int j = j0; j < j1; ++j) {
    const __m256i w0 = unit(j, 0), w1 = unit(j, 1);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256i x = token(t, j);
      whole[t][0] = sums_of<F>(w0, x, whole[t][0]);
      whole[t][1] = sums_of<F>(w1, x, whole[t][1]);
    }
  }
#else
#pragma GCC unroll 8
  for (int i = j0; i < j1; i += kPairUnits<F>) {
    __m256i pairs[T][kTileVecs];
#pragma GCC unroll 8
    for (int j = i; j < i + kPairUnits<F>; ++j) {
      const __m256i w0 = unit(j, 0), w1 = unit(j, 1);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256i x = token(t, j), a = pairs_of<F>(w0, x), b = pairs_of<F>(w1, x);
        pairs[t][0] = j == i ? a : _mm256_add_epi16(pairs[t][0], a);
        pairs[t][1] = j == i ? b : _mm256_add_epi16(pairs[t][1], b);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        const __m256i fours = sums_of_pairs(pairs[t][v]);
        whole[t][v] = i == j0 ? fours : _mm256_add_epi32(whole[t][v], fours);
      }
    }
  }
#endif
}

// What the offset of the numbers adds to the sums of a block, or of its half h.
template <Format F>
static inline __m256i lift_of(const int16_t* sums, int h) {
  const __m256i halves = _mm256_set1_epi32(load_int(reinterpret_cast<const uint8_t*>(sums)));
  constexpr int kBy = kUnsigned<F>;
  const int factors = !is_q6_k(F) ? kBy << 16 | kBy : h ? kBy << 16 : kBy;
  return _mm256_madd_epi16(halves, _mm256_set1_epi32(factors));
}

// What block b adds to the sums of T tokens, for the vectors of rows from `at` on: the float operations are
// those of add_quads.
template <Format F, int T>
static inline void add_block(const uint8_t* at, const Tokens& tokens, int64_t t0, int64_t b,
                             Vec (&sums)[T][kTileVecs]) {
  constexpr int kUnits = 8 / kHalves<F>;
  const int64_t stride = tokens.q_stride, d_stride = stride / kBlock;
  const float* d = tokens.d + t0 * d_stride + b;
  const uint8_t* rest = at + 8 * kUnitBytes;
#pragma GCC unroll 2
  for (int h = 0; h < kHalves<F>; ++h, rest += kUnitBytes) {
    __m256i whole[T][kTileVecs];
    multiply<F, T>(at, tokens.q + t0 * stride + b * kBlock, stride, h * kUnits, (h + 1) * kUnits, whole);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256i lift =
          kUnsigned<F> ? lift_of<F>(tokens.sums + 2 * ((t0 + t) * d_stride + b), h) : _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        const Vec scale = mul(load(rest + v * kVecBytes), splat(d[t * d_stride]));
        sums[t][v] = fma(_mm256_cvtepi32_ps(_mm256_sub_epi32(whole[t][v], lift)), scale, sums[t][v]);
      }
    }
  }
  if constexpr (has_minima(F)) {
    const float* lifts = tokens.lifts + t0 * d_stride + b;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v)
        sums[t][v] = _mm256_fnmadd_ps(load(rest + v * kVecBytes), splat(lifts[t * d_stride]), sums[t][v]);
    }
  }
}

template <Format F, int T>
static void int_panel_tile(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t t0) {
  const int64_t blocks = job.columns / kBlock;
  for (int first = 0; first < kPanelVecs && r0 + first * kLanes < r1; first += kTileVecs) {
    const uint8_t* at = panel + first * kVecBytes;
    Vec sums[kIntPasses][T][kTileVecs];
    for (int pass = 0; pass < kIntPasses; ++pass) {
      for (auto& token : sums[pass]) token[0] = token[1] = zero();
      for (int64_t b = pass; b < blocks; b += kIntPasses, at += kPanelBlock<F>)
        add_block<F, T>(at, job.tokens, t0, b, sums[pass]);
    }
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < kTileVecs; ++v) {
        const Vec total = add(add(sums[0][t][v], sums[1][t][v]), add(sums[2][t][v], sums[3][t][v]));
        store_rows(job, &total, 1, r0 + (first + v) * kLanes, r1, t0 + t, 1);
      }
    }
  }
}

template <Format F>
static void int_panel_dot(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
                          uint8_t*) {
  int64_t t = 0;
  for (; t + kTileRows<F> <= tokens; t += kTileRows<F>)
    int_panel_tile<F, kTileRows<F>>(job, panel, r0, r1, t);
  for (; t < tokens; ++t) int_panel_tile<F, 1>(job, panel, r0, r1, t);
}

template <Format F>
constexpr TokenForm kPanelForm = has_minima(F) ? kOffsetBytes : kBytes;
