// What sums.inl does, a row at a time: plain code for levels without quads.

template <Format F>
constexpr bool kFileOrder = false;
template <Format F>
constexpr bool kWholeBytes = false;
template <Format F>
constexpr int kUnsigned = 0;

template <Format F>
constexpr int kDigitBase = 256;

struct Digits {
  int32_t at[kDigits];
};

static inline Digits digits_of(float factor) {
  auto left = static_cast<int32_t>(nearest(splat(factor))[0]);
  Digits digits;
  for (int32_t& digit : digits.at) {
    const int32_t above = (left + 128) >> 8;
    digit = left - above * 256;
    left = above;
  }
  return digits;
}

template <Format F>
static void add_part(const Part<F>& part, int i, float factor, float least, SumStep* to) {
  const PartScales scales = part_scales<F>(part);
  int8_t numbers[kBlock];
  unpack_numbers<F>(part, numbers);
  for (int half = 0; half < 2; ++half) {
    const Digits digits = digits_of(scales.scale[F == kQ6_K ? half : 0] * factor);
    for (int d = 0; d < kDigits; ++d) {
      for (int j = 0; j < 16; ++j)
        to->at[d][(half * 4 + j / 4) * 16 + i * 4 + j % 4] += digits.at[d] * numbers[half * 16 + j];
    }
  }
  if constexpr (has_minima(F)) {
    const Digits digits = digits_of(scales.least * least);
    for (int d = 0; d < kDigits; ++d) to->least[4 * i + d] += digits.at[d];
  }
}

template <Format F>
static void add_sums(const SumJob& job, int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
  for (int64_t k = k0; k < k1; ++k) {
    const SumTile<1> tile = sum_tile<1>(job, k, k + 1, k1);
    for (int64_t b = 0; b < (c1 - c0) / kBlock; ++b) {
      add_part<F>(part_at<F>(tile.rows.now[0], c0 / kBlock + b), static_cast<int>(b % 4), tile.factor[0],
                  tile.least[0], job.sums + b / 4);
    }
  }
}
