// Kernels over single vectors: exponentials, activations, norms, rotation, quantisation, sums.

// e^x to about one unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2 and the Taylor series of e^r,
// whose eighth term is below 2^-27. Below e^-87 the result is 0, above e^88.7 infinity.
static inline Vec exponential(Vec x) {
  const Vec low = splat(-87.0f), high = splat(89.0f);
  const Vec clamped = max(low, min(high, x));
  const Vec n = nearest(mul(clamped, splat(1.44269504f)));
  // ln 2 in two parts, the first with trailing zeros, so that n times it is exact.
  Vec r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return keep_from(times_power(p, n), x, low);
}

#include "gelu.inl"

// The last elements go through a vector as well: what becomes of a value must not depend on where it stands.
template <class Map>
static inline void map_vectors(float* x, int64_t n, Map map) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, map(load(x + i)));
  if (i == n) return;
  float tail[kLanes] = {};
  memcpy(tail, x + i, static_cast<size_t>(n - i) * sizeof(float));
  store(tail, map(load(tail)));
  memcpy(x + i, tail, static_cast<size_t>(n - i) * sizeof(float));
}

static void activate(Activation activation, float threshold, float* x, int64_t n) {
  const Vec limit = splat(threshold), one = splat(1.0f), minus = splat(-1.0f);
  if (activation == kSilu) {
    map_vectors(x, n, [=](Vec v) { return div(v, add(one, exponential(mul(v, minus)))); });
  } else if (activation == kGelu) {
    map_vectors(x, n, [=](Vec v) { return gelu(v); });
  } else if (activation == kRelu) {
    map_vectors(x, n, [=](Vec v) { return keep_above(v, limit); });
  } else {
    map_vectors(x, n, [=](Vec v) {
      const Vec kept = keep_above(v, limit);
      return mul(kept, kept);
    });
  }
}

// The ids found so far are never more than those looked at: a whole vector of them fits behind the last.
static int64_t select(const float* scores, int64_t tokens, int64_t n, float threshold, int32_t* out) {
  const Vec limit = splat(threshold);
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t found = 0;
    for (int64_t t = 0; t < tokens; ++t) found |= at_least(load(scores + t * n + i), limit);
    count += list_bits(found, static_cast<int32_t>(i), out + count);
  }
  for (; i < n; ++i) {
    int found = 0;
    for (int64_t t = 0; t < tokens; ++t) found |= scores[t * n + i] >= threshold;
    out[count] = static_cast<int32_t>(i);
    count += found;
  }
  return count;
}

static int64_t flag_nonzero(const float* x, int64_t n, uint8_t* flags) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t set = x[i] != 0.0f;
    flags[i] |= set;
    total += set;
  }
  return total;
}

static int64_t list_flags(const uint8_t* flags, int64_t n, int32_t* out) {
  constexpr int kBits = kLanes < 8 ? kLanes : 8;
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t found = 0;
    for (int j = 0; j < kLanes; j += kBits) {
      uint64_t bytes = 0;
      memcpy(&bytes, flags + i + j, kBits);
      found |= static_cast<uint32_t>(bytes * 0x0102040810204080 >> 56) << j;  // bit k is that of byte k
    }
    count += list_bits(found, static_cast<int32_t>(i), out + count);
  }
  for (; i < n; ++i) {
    out[count] = static_cast<int32_t>(i);
    count += flags[i];
  }
  return count;
}

static void close_gates(const float* gates, const int32_t* places, float* h, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(h + i, gated(places ? gather(gates, places + i) : load(gates + i), load(h + i)));
  for (; i < n; ++i) {
    const float gate = gates[places ? places[i] : i];
    h[i] = gate == 0.0f ? 0.0f : gate * h[i];
  }
}

// The squares are summed in double: large activations overflow no float there.
static void rms_norm(const float* x, const float* weight, double eps, float* out, int64_t n) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) lane[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  }
  double total = 0;
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int j = 0; j < 8; ++j) total += lane[j];
  const double scale = 1.0 / sqrt(total / static_cast<double>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = static_cast<float>(x[i] * scale) * weight[i];
}

static void rope(float* head, const float* cosine, const float* sine, int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i * step], b = head[i * step + apart];
    head[i * step] = a * cosine[i] - b * sine[i];
    head[i * step + apart] = a * sine[i] + b * cosine[i];
  }
}

// Below this a block is taken as zero: its inverse would overflow, and its part of a sum is less than any
// rounding.
constexpr float kTinyBlock = 1e-35f;

static void quantize(const float* x, int64_t n, int8_t* q, float* d, int16_t* sums) {
  const Vec minus = splat(-1.0f);
  for (int64_t b = 0; b < n / kBlock; ++b, x += kBlock, q += kBlock, sums += kBlock / 16) {
    Vec peak = zero(), poison = zero();
    for (int i = 0; i < kBlock; i += kLanes) {
      const Vec v = load(x + i);
      peak = max(peak, max(v, mul(v, minus)));
      poison = fma(v, zero(), poison);  // NaN as soon as one value is not finite
    }
    const float largest_value = largest(peak), marker = sum(poison);
    if (marker != 0.0f || largest_value < kTinyBlock) {
      memset(q, 0, kBlock);
      memset(sums, 0, kBlock / 16 * sizeof(int16_t));
      d[b] = marker;
      continue;
    }
    d[b] = largest_value / 127.0f;
    pack_block(x, 127.0f / largest_value, q, sums);
  }
}

static float softmax_part(float* scores, int64_t n, float scale, float* m) {
  const Vec factor = splat(scale);
  Vec peak = splat(-INFINITY);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = mul(load(scores + i), factor);
    store(scores + i, v);
    peak = max(peak, v);
  }
  *m = largest(peak);
  if (*m == -INFINITY) {
    for (int64_t i = 0; i < n; ++i) scores[i] = 0.0f;
    return 0.0f;
  }
  const Vec shift = splat(-*m);
  // 16 partial sums whatever the lanes, taken in steps that begin where the chunk begins: a masked step adds
  // zeros.
  Vec total[16 / kLanes];
  for (int v = 0; v < 16 / kLanes; ++v) total[v] = zero();
  for (int64_t i = 0; i < n; i += 16) {
    for (int v = 0; v < 16 / kLanes; ++v) {
      const Vec p = exponential(add(load(scores + i + v * kLanes), shift));
      store(scores + i + v * kLanes, p);
      total[v] = add(total[v], p);
    }
  }
  float result = 0.0f;
  for (int v = 0; v < 16 / kLanes; ++v) result += sum(total[v]);
  return result;
}

static void reduce(const float* parts, int64_t count, int64_t stride, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float total = 0.0f;
    for (int64_t p = 0; p < count; ++p) total += parts[p * stride + i];
    out[i] += total;
  }
}

static void to_half(const float* x, uint8_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_f16(out + 2 * i, load(x + i));
  for (; i < n; ++i) store_u16(out + 2 * i, half_of_float(x[i]));
}
