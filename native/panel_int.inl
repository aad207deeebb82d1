// Panels of integer formats. Of a block of 32 columns a panel holds eight units of 32 rows; what to add to
// the integer sums because tokens are stored with 128 added; scales; minima.
//
// A lane of dot_quads.inl sums every fourth block: these are taken in one pass here, so that the sums are the
// same to the bit.

// Panels of integer formats take every fourth block of 32 columns in one pass.
constexpr int kIntPasses = 4;

static inline int64_t blocks_of_pass(int64_t pass, int64_t blocks) {
  return (blocks - pass + kIntPasses - 1) / kIntPasses;
}

// Where block b lies among `blocks`, pass by pass.
static inline int64_t place_of_block(int64_t b, int64_t blocks) {
  int64_t place = b / kIntPasses;
  for (int64_t pass = 0; pass < b % kIntPasses; ++pass) place += blocks_of_pass(pass, blocks);
  return place;
}

constexpr int64_t kUnitBytes = kPanelVecs * sizeof(Vec);

// Parts of a block with a scale each.
template <Format F>
constexpr int kHalves = is_q6_k(F) ? 2 : 1;
template <Format F>
constexpr int64_t kPanelBlock = (8 + 2 * kHalves<F> + (has_minima(F) ? 1 : 0)) * kUnitBytes;

template <Format F>
static int64_t int_panel_bytes(int64_t columns) {
  return columns / kBlock * kPanelBlock<F>;
}

// Vector v of a block, of which `units` holds the numbers.
template <Format F>
static inline void pack_block_of(const PanelLanes& lanes, int64_t b, const __m512i* units, int v,
                                 uint8_t* to) {
  constexpr int kUnits = 8 / kHalves<F>;
  to += v * sizeof(Vec);
  float scale[2][kLanes], least[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const PartScales s = part_scales<F>(part_at<F>(lanes.row[i], b));
    scale[0][i] = s.scale[0];
    scale[1][i] = s.scale[1];
    least[i] = s.least;
  }
  uint8_t* rest = to + 8 * kUnitBytes;
  for (int h = 0; h < kHalves<F>; ++h) {
    __m512i excess = _mm512_setzero_si512();
    for (int j = h * kUnits; j < (h + 1) * kUnits; ++j) {
      excess = _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(static_cast<char>(128)), units[j]);
      _mm512_storeu_si512(to + j * kUnitBytes, units[j]);
    }
    _mm512_storeu_si512(rest, _mm512_sub_epi32(_mm512_setzero_si512(), excess));
    memcpy(rest + kUnitBytes, scale[h], sizeof scale[h]);
    rest += 2 * kUnitBytes;
  }
  if constexpr (has_minima(F)) memcpy(rest, least, sizeof least);
}

template <Format F>
static void pack_ints(const Rows& rows, int64_t r0, int64_t r1, int64_t columns, uint8_t* panel) {
  const int64_t blocks = columns / kBlock;
  for (int v = 0; v < kPanelVecs; ++v) {
    const PanelLanes lanes(rows, r0, r1, v);
    for (int64_t b = 0; b < blocks; b += 2) {
      const bool pair = b + 1 < blocks;
      __m512i units[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m256i first = numbers<F>(part_at<F>(lanes.row[i], b));
        const __m256i second = pair ? numbers<F>(part_at<F>(lanes.row[i], b + 1)) : first;
        units[i] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
      }
      transpose(units);
      pack_block_of<F>(lanes, b, units, v, panel + place_of_block(b, blocks) * kPanelBlock<F>);
      if (pair)
        pack_block_of<F>(lanes, b + 1, units + 8, v, panel + place_of_block(b + 1, blocks) * kPanelBlock<F>);
    }
  }
}

// What block b adds to the sums of T tokens: the integers are exact, the float operations those of add_quads.
template <Format F, int T>
static inline void add_block(const uint8_t* at, const Tokens& tokens, int64_t t0, int64_t b,
                             Vec (&sums)[T][kPanelVecs]) {
  constexpr int kUnits = 8 / kHalves<F>;
  const uint8_t* q = tokens.offset + t0 * tokens.q_stride + b * kBlock;
  const float* d = tokens.d + t0 * tokens.q_stride / kBlock + b;
  const int64_t d_stride = tokens.q_stride / kBlock;
  const uint8_t* rest = at + 8 * kUnitBytes;
#pragma GCC unroll 2
  for (int h = 0; h < kHalves<F>; ++h) {
    __m512i whole[T][kPanelVecs];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVecs; ++v) whole[t][v] = _mm512_loadu_si512(rest + v * sizeof(Vec));
    }
#pragma GCC unroll 8
    for (int j = h * kUnits; j < (h + 1) * kUnits; ++j) {
      const __m512i w0 = _mm512_loadu_si512(at + j * kUnitBytes);
      const __m512i w1 = _mm512_loadu_si512(at + j * kUnitBytes + sizeof(Vec));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512i x = _mm512_set1_epi32(load_int(q + t * tokens.q_stride + 4 * j));
        whole[t][0] = _mm512_dpbusd_epi32(whole[t][0], x, w0);
        whole[t][1] = _mm512_dpbusd_epi32(whole[t][1], x, w1);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) {
      const Vec scale = load(rest + kUnitBytes + v * sizeof(Vec));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        sums[t][v] = fma(_mm512_cvtepi32_ps(whole[t][v]), mul(scale, splat(d[t * d_stride])), sums[t][v]);
    }
    rest += 2 * kUnitBytes;
  }
  if constexpr (has_minima(F)) {
    const float* lifts = tokens.lifts + t0 * d_stride + b;
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) {
      const Vec least = load(rest + v * sizeof(Vec));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        sums[t][v] = _mm512_fnmadd_ps(least, splat(lifts[t * d_stride]), sums[t][v]);
    }
  }
}

template <Format F, int T>
static void int_panel_tile(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t t0) {
  const int64_t blocks = job.columns / kBlock;
  PassTree<T, 2> tree;
  for (int pass = 0; pass < kIntPasses; ++pass) {
    Vec sums[T][kPanelVecs];
    clear<T>(sums);
    for (int64_t b = pass; b < blocks; b += kIntPasses, panel += kPanelBlock<F>)
      add_block<F, T>(panel, job.tokens, t0, b, sums);
    tree.put(pass, sums);
  }
  store_sums(job, tree.total()[0], r0, r1, t0, T);
}

// Tiles of 2 x 6 integer sums and as many float sums, two weights and a token take 27 of the 32 registers.
template <Format F>
static void int_panel_dot(const DotJob& job, const uint8_t* panel, int64_t r0, int64_t r1, int64_t tokens,
                          uint8_t*) {
  int64_t t = 0;
  for (; t + 6 <= tokens; t += 6) int_panel_tile<F, 6>(job, panel, r0, r1, t);
  for (; t + 2 <= tokens; t += 2) int_panel_tile<F, 2>(job, panel, r0, r1, t);
  if (t < tokens) int_panel_tile<F, 1>(job, panel, r0, r1, t);
}

template <Format>
constexpr TokenForm kPanelForm = kOffsetBytes;
