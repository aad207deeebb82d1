// What decides the unit of a weighted sum: the largest scales and factors.

// Floats are compared by their bits, by which a NaN is larger than any number, and what has a sign than that.
static inline void keep_larger(uint32_t& largest, float value) {
  const auto bits = __builtin_bit_cast(uint32_t, value);
  largest = bits > largest ? bits : largest;
}
static inline void keep_largest(uint32_t& largest, float value) { keep_larger(largest, fabsf(value)); }
static inline float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

template <Format F>
static LargestScale largest_scale(const uint8_t* row, int64_t columns) {
  uint32_t scale = 0, least = 0;
  for (int64_t b = 0; b < columns / kBlock; ++b) {
    const PartScales part = part_scales<F>(part_at<F>(row, b));
    keep_largest(scale, part.scale[0]);
    if constexpr (is_q6_k(F)) keep_largest(scale, part.scale[1]);
    if constexpr (has_minima(F)) keep_largest(least, part.least);
  }
  return {float_of_bits(scale), float_of_bits(least)};
}

static float largest_factor(const FactorJob& job, const float* scales, int64_t count) {
  uint32_t largest = 0;
  if (!job.list && !job.positions && !job.rows) {
    for (int64_t k = 0; k < count; ++k) keep_larger(largest, fabsf(job.h[k]) * scales[k]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = job.list ? job.list[i] : i;
      const float h = job.h[job.positions ? job.positions[k] : k];
      keep_larger(largest, fabsf(h) * scales[job.rows ? job.rows[k] : k]);
    }
  }
  return float_of_bits(largest);
}
