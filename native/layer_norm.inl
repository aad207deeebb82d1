// LayerNorm. Sums are taken in double: large activations overflow no float there, and a mean far from zero
// costs no digits of the variance.

static void layer_norm(const float* x, const float* weight, const float* bias, double eps, float* out,
                       int64_t n) {
  const auto sum = [n](auto term) {
    double lane[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      for (int j = 0; j < 8; ++j) lane[j] += term(i + j);
    }
    double total = 0;
    for (; i < n; ++i) total += term(i);
    for (int j = 0; j < 8; ++j) total += lane[j];
    return total;
  };
  const double count = static_cast<double>(n);
  const double mean = sum([=](int64_t i) { return static_cast<double>(x[i]); }) / count;
  const double variance = sum([=](int64_t i) {
    const double off = static_cast<double>(x[i]) - mean;
    return off * off;
  });
  const double scale = 1.0 / sqrt(variance / count + eps);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<float>((static_cast<double>(x[i]) - mean) * scale) * weight[i] + bias[i];
  }
}
