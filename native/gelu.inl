// x * Phi(x), Phi the normal distribution: max(x, 0) - |x| * Phi(-|x|), where with z = |x| / sqrt(2)
// Phi(-|x|) = e^(-z^2) * erfcx(z) / 2. erfcx(z) / t is a polynomial in t = 1 / (1 + z / 2) to 5e-8 of its
// value, fitted for |x| up to 13.4, from where on the exponential is 0.
static inline Vec gelu(Vec x) {
  const Vec one = splat(1.0f), minus = splat(-1.0f);
  // NaN stays, and infinity becomes no 0 * infinity.
  const Vec size = min(splat(20.0f), max(x, mul(x, minus)));
  const Vec t = div(one, fma(size, splat(0.35355339f), one));
  Vec p = splat(-0.05889077f);
  p = fma(p, t, splat(0.28370193f));
  p = fma(p, t, splat(-0.48538354f));
  p = fma(p, t, splat(0.27597791f));
  p = fma(p, t, splat(-0.025177462f));
  p = fma(p, t, splat(0.20206971f));
  p = fma(p, t, splat(0.24326104f));
  p = fma(p, t, splat(0.28235349f));
  p = fma(p, t, splat(0.28208768f));
  const Vec bell = exponential(mul(mul(size, size), splat(-0.5f)));
  const Vec tail = mul(mul(bell, splat(0.5f)), mul(p, t));
  return add(max(x, zero()), mul(mul(size, tail), minus));
}
