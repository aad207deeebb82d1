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
    const Digits digits = digits_of(scales.scale[is_q6_k(F) ? half : 0] * factor);
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

static inline float factor_of(double weight, double per_unit) {
  const double factor = weight * per_unit;
  return static_cast<float>(factor > kMostFactor    ? kMostFactor
                            : factor < -kMostFactor ? -kMostFactor
                                                    : factor);
}

template <Format F>
static void add_sums(const SumJob& job, int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
  for (int64_t k = k0; k < k1; ++k) {
    const uint8_t* row = row_at(job.rows, sum_place(job, k));
    const double weight = weight_of(job, k);
    const float factor = factor_of(weight, job.per_factor), least = factor_of(weight, job.per_least);
    for (int64_t b = 0; b < (c1 - c0) / kBlock; ++b) {
      add_part<F>(part_at<F>(row, c0 / kBlock + b), static_cast<int>(b % 4), factor, least, job.sums + b / 4);
    }
  }
}
