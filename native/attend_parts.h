// What both ways of attention share: the cache, and sums of the online softmax.
#pragma once

#include <cstdint>

#include "attention.h"

namespace thermocline {

constexpr int64_t kStep = 16;  // keys that softmax_part takes at once

// The softmax sums of some queries over some keys.
struct Sums {
  float* acc;     // (queries, head_dim): sum of exp(score - most) * value
  float* most;    // (queries)
  float* weight;  // (queries): sum of exp(score - most)

  // Floats that they take.
  static int64_t size(int64_t queries, int64_t dim) { return queries * (dim + 2); }

  Sums(float* memory, int64_t queries, int64_t dim)
      : acc(memory), most(memory + queries * dim), weight(memory + queries * (dim + 1)) {}

  void clear(int64_t queries, int64_t dim) const;

  // Query `to` += query i of part, both brought to the larger of the two maxima.
  void merge(const Kernels& kernels, int64_t to, const Sums& part, int64_t i, int64_t dim) const;
};

// Writes keys and values `begin` .. `end`, of (tokens, kv_heads), into the cache.
void write_cache(const Kernels& kernels, const AttentionJob& job, int64_t begin, int64_t end);

// Makes scores first .. last of a row weights, and the others up to `steps`, whole steps, zeros; keeps the
// maximum and the sum as those of query i.
void soften(const Kernels& kernels, const AttentionJob& job, float* row, int64_t first, int64_t last,
            int64_t steps, const Sums& sums, int64_t i);

// Writes the result of query i of a block of tokens from t0 on, whose sums are those of query `from`.
void finish(const AttentionJob& job, int64_t head, int64_t t0, int64_t i, const Sums& sums, int64_t from);

}  // namespace thermocline
