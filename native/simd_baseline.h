// Four float lanes in the compiler's own vectors: any CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "format.h"
#include "half.h"

namespace thermocline::THERMOCLINE_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kDotRows = 4;
constexpr int kFloatRows = 2;
constexpr int kFloatTokens = 2;
template <Format>
constexpr int kIntTokens = 2;
constexpr int kAxpyRows = 2;

static inline Vec splat(float a) { return Vec{a, a, a, a}; }
static inline Vec zero() { return splat(0.0f); }
static inline Vec load(const void* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec sub(Vec a, Vec b) { return a - b; }
static inline Vec mul(Vec a, Vec b) { return a * b; }
// One lane of fma().
static inline float fma_one(float a, float b, float c) { return a * b + c; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec div(Vec a, Vec b) { return a / b; }
// Both return b where either is NaN.
static inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec keep_above(Vec x, Vec limit) { return x > limit ? x : zero(); }
// gate * x, 0 where the gate is.
static inline Vec gated(Vec gate, Vec x) { return gate == zero() ? zero() : gate * x; }
static inline Vec gather(const float* x, const int32_t* places) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[places[i]];
  return v;
}
// v, 0 where x < limit.
static inline Vec keep_from(Vec v, Vec x, Vec limit) { return x < limit ? zero() : v; }
// Bit i is set where a[i] is at least limit[i]; NaN is not.
static inline uint32_t at_least(Vec a, Vec limit) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= limit[i]) << i;
  return bits;
}
// Writes base + i for every set bit i to out, which has room for kLanes; returns how many.
static inline int list_bits(uint32_t bits, int32_t base, int32_t* out) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[count] = base + i;
    count += bits >> i & 1;
  }
  return count;
}
static inline float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}
static inline float largest(Vec v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

// Nearest integer of |x| < 2^22, ties to even.
static inline Vec nearest(Vec x) {
  const Vec magic = splat(0x1.8p23f);
  return (x + magic) - magic;
}
static inline Vec power_of_two(Vec n) {
  const Int bits = (__builtin_convertvector(n, Int) + 127) << 23;
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
// x * 2^n for whole n up to 128, whose power is no float: by two halves of it.
static inline Vec times_power(Vec x, Vec n) {
  const Vec half = nearest(mul(n, splat(0.5f)));
  return mul(mul(x, power_of_two(half)), power_of_two(sub(n, half)));
}

static inline Vec load_f16(const uint8_t* p) {
  return Vec{load_half(p), load_half(p + 2), load_half(p + 4), load_half(p + 6)};
}
static inline Vec load_bf16(const uint8_t* p) {
  return Vec{load_bfloat(p), load_bfloat(p + 2), load_bfloat(p + 4), load_bfloat(p + 6)};
}
static inline void store_f16(uint8_t* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) store_u16(p + 2 * i, half_of_float(v[i]));
}
static inline float scale_of(const uint8_t* p) { return load_half(p); }

// 32 rounded values of x * inverse as bytes, and the sums of both halves.
static inline void pack_block(const float* x, float inverse, int8_t* q, int16_t* sums) {
  sums[0] = sums[1] = 0;
  for (int i = 0; i < kBlock; i += 4) {
    const Vec r = nearest(load(x + i) * inverse);
    for (int j = 0; j < 4; ++j) {
      q[i + j] = static_cast<int8_t>(r[j]);
      sums[i / 16] = static_cast<int16_t>(sums[i / 16] + q[i + j]);
    }
  }
}

struct IntTokens {
  const int8_t* q;
  Vec d;
};
struct IntWeights {
  int8_t q[kBlock];
  int scale[2];  // of the halves, Q6_K only
  Vec d, least;
};

static inline IntTokens int_tokens(const int8_t* q, const float* d) { return {q, splat(*d)}; }

// The 32 numbers of a part, without its scale.
template <Format F>
static inline void unpack_numbers(const Part<F>& at, int8_t* q) {
  const uint8_t* p = numbers_at(at);
  if constexpr (F == kQ8_0) {
    std::memcpy(q, p, kBlock);
  } else if constexpr (is_in_halves(F)) {
    for (int i = 0; i < 16; ++i) {
      q[i] = static_cast<int8_t>((p[i] & 15) - offset_of(F));
      q[16 + i] = static_cast<int8_t>((p[i] >> 4) - offset_of(F));
    }
  } else {
    uint8_t stored[kBlock];
    unpack_part<F>(at, stored);
    for (int i = 0; i < kBlock; ++i) q[i] = static_cast<int8_t>(stored[i] - offset_of(F));
  }
}

template <Format F>
static inline IntWeights int_weights(const Part<F>& at) {
  IntWeights w;
  unpack_numbers<F>(at, w.q);
  float d = load_half(scale_at(at));
  if constexpr (has_minima(F)) {
    const ScaleMin s = scale_min(at.block + 4, at.part);
    d *= static_cast<float>(s.scale);
    w.least = splat(load_half(at.block + 2) * static_cast<float>(s.least));
  }
  if constexpr (is_q6_k(F)) {
    for (int i = 0; i < 2; ++i) w.scale[i] = static_cast<int8_t>(at.block[192 + 2 * at.part + i]);
  }
  w.d = splat(d);
  return w;
}

template <Format F>
static inline Vec int_dot(const IntWeights& w, const IntTokens& x) {
  Int total{};
  for (int half = 0; half < 2; ++half) {
    int32_t lane[kLanes] = {};
    for (int i = half * 16; i < half * 16 + 16; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lane[j] += static_cast<int32_t>(w.q[i + j]) * x.q[i + j];
    }
    Int v;
    std::memcpy(&v, lane, sizeof v);
    total += is_q6_k(F) ? v * w.scale[half] : v;
  }
  return __builtin_convertvector(total, Vec);
}

// The 32 numbers of a part as floats, without its scale.
template <Format F>
static inline void load_numbers(const Part<F>& at, Vec (&w)[kBlock / kLanes]) {
  int8_t stored[kBlock];
  unpack_numbers<F>(at, stored);
  for (int i = 0; i < kBlock / kLanes; ++i) {
    const int8_t* q = stored + i * kLanes;
    w[i] = Vec{float(q[0]), float(q[1]), float(q[2]), float(q[3])};
  }
}

}  // namespace thermocline::THERMOCLINE_ISA
