// Causal grouped-query attention over a cache of keys and values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "context.h"

namespace thermocline {

// Keys or values: (kv heads, positions, head_dim) in F16, F32 or Q8_0, with strides in bytes.
struct Cache {
  uint8_t* data;
  Format format;
  int64_t head_stride, row_bytes;

  uint8_t* row(int64_t head, int64_t position) const {
    return data + head * head_stride + position * row_bytes;
  }
};

struct AttentionJob {
  const float *q, *k, *v;  // (tokens, heads or kv_heads, head_dim)
  int64_t tokens, heads, kv_heads, head_dim;
  Cache keys, values;
  int64_t start, window;  // window 0: no limit
  float scale;
  float* out;  // (tokens, heads, head_dim)

  int64_t group() const { return heads / kv_heads; }

  // The first position that token t sees.
  int64_t visible_from(int64_t t) const {
    return window > 0 ? std::max<int64_t>(0, start + t - window + 1) : 0;
  }
};

constexpr int64_t kAttendKeys = 512;  // of a chunk

// Writes k and v into the cache from `start` on, then attends. The keys are cut into chunks at fixed
// positions; each is summed with its own maximum, and the chunks are merged in order (the online softmax of
// FlashAttention, Dao et al. 2022), so that the result does not depend on threads nor on the other tokens of
// the batch. Queries that meet keys in Q8_0 are rounded to 8 bits, as activations that meet weights are.
// Batches that PanelAttention takes are the exception: they meet keys and values as split numbers.
void attention(Context& context, const AttentionJob& job);

}  // namespace thermocline
