#include "attend_parts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "requantize.h"

namespace thermocline {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

void store(const Kernels& kernels, const AttentionJob& job, const Cache& cache, int64_t i, const float* x) {
  uint8_t* row = cache.row(i % job.kv_heads, job.start + i / job.kv_heads);
  if (cache.format == kF16) {
    kernels.to_half(x, row, job.head_dim);
  } else if (cache.format == kQ8_0) {
    encode_q8_0(x, job.head_dim, row);
  } else {
    std::memcpy(row, x, static_cast<size_t>(job.head_dim) * sizeof(float));
  }
}

}  // namespace

void Sums::clear(int64_t queries, int64_t dim) const {
  std::fill(acc, acc + queries * dim, 0.0f);
  std::fill(most, most + queries, kNone);
  std::fill(weight, weight + queries, 0.0f);
}

void Sums::merge(const Kernels& kernels, int64_t to, const Sums& part, int64_t i, int64_t dim) const {
  if (part.weight[i] == 0.0f) return;
  const float larger = std::max(most[to], part.most[i]);
  const float keep = std::exp(most[to] - larger), take = std::exp(part.most[i] - larger);
  kernels.attend.blend(acc + to * dim, keep, part.acc + i * dim, take, dim);
  weight[to] = weight[to] * keep + part.weight[i] * take;
  most[to] = larger;
}

void write_cache(const Kernels& kernels, const AttentionJob& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    store(kernels, job, job.keys, i, job.k + i * job.head_dim);
    store(kernels, job, job.values, i, job.v + i * job.head_dim);
  }
}

void soften(const Kernels& kernels, const AttentionJob& job, float* row, int64_t first, int64_t last,
            int64_t steps, const Sums& sums, int64_t i) {
  std::fill(row, row + first, kNone);
  std::fill(row + last, row + steps, kNone);
  sums.weight[i] = kernels.softmax_part(row, steps, job.scale, &sums.most[i]);
}

void finish(const AttentionJob& job, int64_t head, int64_t t0, int64_t i, const Sums& sums, int64_t from) {
  const int64_t group = job.group(), dim = job.head_dim;
  float* out = job.out + ((t0 + i / group) * job.heads + head * group + i % group) * dim;
  const float share = 1.0f / sums.weight[from];
  for (int64_t c = 0; c < dim; ++c) out[c] = sums.acc[from * dim + c] * share;
}

}  // namespace thermocline
