// What weighted sums come to.

// A step's sums over all parts.
static inline SumStep whole_step(const SumStep* parts, int64_t count, int64_t stride) {
  constexpr int kInts = sizeof(SumStep) / sizeof(int32_t);
  SumStep total = *parts;
  auto* to = reinterpret_cast<int32_t*>(&total);
  for (int64_t p = 1; p < count; ++p) {
    const auto* from = reinterpret_cast<const int32_t*>(parts + p * stride);
    for (int i = 0; i < kInts; ++i) to[i] += from[i];
  }
  return total;
}

// What digits come to: below 2^53, so that any digits of a number give the same.
template <Format F>
static inline double number_of(const int32_t* digits) {
  constexpr double kBase = kDigitBase<F>;
  return (digits[2] * kBase + digits[1]) * kBase + digits[0];
}

// The block, and its half, that the columns at place 4 * lane of a half belong to.
template <Format F>
static inline int block_of(int half, int lane) {
  return kFileOrder<F> ? lane / 2 * 2 + half : lane;
}
template <Format F>
static inline int part_of(int half, int lane) {
  return kFileOrder<F> ? lane % 2 : half;
}

// One half of a step's columns.
template <Format F, int half>
static inline void finish_half(const SumStep& sums, const SumUnits& units, int64_t columns, float* out) {
  int32_t off[kDigits][16] = {};
  double least[16] = {};
  for (int i = 0; i < 16; ++i) {
    const int part = part_of<F>(half, i / 4), block = block_of<F>(half, i / 4);
    for (int d = 0; d < kDigits; ++d) {
      if (kUnsigned<F>) off[d][i] = kUnsigned<F> * sums.factors[F == kQ6_K ? part : 0][4 * block + d];
    }
    if (has_minima(F)) least[i] = units.least * number_of<F>(sums.least + 4 * block);
  }
  for (int j = 0; j < 4; ++j) {
    float values[16];
    for (int i = 0; i < 16; ++i) {
      const int place = (half * 4 + j) * 16 + i;
      int32_t digits[kDigits];
      for (int d = 0; d < kDigits; ++d) {
        const int32_t sum = sums.at[d][place];
        digits[d] = (kWholeBytes<F> && half ? (sum - sums.at[d][place - 64]) >> 4 : sum) - off[d][i];
      }
      values[i] = static_cast<float>(number_of<F>(digits) * units.factor - least[i]);
    }
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t column = block_of<F>(half, lane) * kBlock + part_of<F>(half, lane) * 16 + 4 * j;
      if (column >= columns) continue;
      for (int t = 0; t < 4; ++t) out[column + t] += values[4 * lane + t];
    }
  }
}

template <Format F>
static void finish_sums(const SumStep* parts, int64_t count, int64_t stride, const SumUnits& units,
                        int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += kSumColumns, ++parts) {
    const SumStep total = whole_step(parts, count, stride);
    finish_half<F, 0>(total, units, columns - c, out + c);
    finish_half<F, 1>(total, units, columns - c, out + c);
  }
}
