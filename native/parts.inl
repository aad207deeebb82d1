// The scales of a part of a row, and its floats.

// What a part's numbers are multiplied with, in Q6_K one for each half, and what is taken off then.
struct PartScales {
  float scale[2], least;
};

template <Format F>
static inline PartScales part_scales(const Part<F>& at) {
  const float d = scale_of(scale_at(at));
  if constexpr (is_q6_k(F)) {
    const auto* s = reinterpret_cast<const int8_t*>(at.block + 192 + 2 * at.part);
    return {{d * static_cast<float>(s[0]), d * static_cast<float>(s[1])}, 0.0f};
  } else if constexpr (has_minima(F)) {
    const ScaleMin s = scale_min(at.block + 4, at.part);
    return {{d * static_cast<float>(s.scale)}, scale_of(at.block + 2) * static_cast<float>(s.least)};
  } else {
    return {{d}, 0.0f};
  }
}

// The 32 floats of a part.
template <Format F>
static inline void load_block(const Part<F>& at, Vec (&w)[kBlock / kLanes]) {
  const PartScales s = part_scales<F>(at);
  load_numbers<F>(at, w);
#pragma GCC unroll 8
  for (int v = 0; v < kBlock / kLanes; ++v) {
    w[v] = mul(splat(s.scale[is_q6_k(F) && v * kLanes >= 16]), w[v]);
    if constexpr (has_minima(F)) w[v] = sub(w[v], splat(s.least));
  }
}
