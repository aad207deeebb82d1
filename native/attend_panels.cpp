#include "attend_panels.h"

#include <algorithm>
#include <numeric>

#include "linear.h"

namespace thermocline {
namespace {

constexpr int64_t kBlockQueries = 256;             // of a block at most: so many share the making of panels
constexpr int64_t kFewQueries = 2 * kGroupTokens;  // that meet the panels of a chunk at a time
constexpr int64_t kKeysOfStep = kPairColumns;
constexpr int64_t kMostSteps = kAttendKeys / kKeysOfStep;
// A dot's scratch memory has room for the sums of so many rows, which are columns of values here.
constexpr int64_t kMostDim = 1024;

}  // namespace

bool PanelAttention::pays(const Kernels& kernels, const AttentionJob& job) {
  return job.tokens >= kRoundedTokens && job.head_dim <= kMostDim &&
         kernels.split.panel[job.keys.format].dot && kernels.split.pack_across[job.values.format];
}

PanelAttention::PanelAttention(Context& context, const AttentionJob& job)
    : context_(context),
      job_(job),
      kernels_(context.kernels),
      group_(job.group()),
      dim_(job.head_dim),
      dim_steps_(parts_of(job.head_dim, kPairColumns)),
      team_(context.team((job.start + job.tokens - job.visible_from(0)) * job.kv_heads *
                         (job.keys.row_bytes + job.values.row_bytes) * job.tokens)) {
  const int64_t fair = parts_of(job.tokens * job.kv_heads, 4 * static_cast<int64_t>(team_.size()));
  const int64_t least = parts_of(kFewQueries, group_), most = std::max<int64_t>(1, kBlockQueries / group_);
  block_tokens_ = std::clamp(fair, std::min(least, most), most);
  Arena& arena = context.arena;
  const int workers = team_.size();
  const int64_t queries = parts_of(block_tokens_ * group_, kGroupTokens) * kGroupTokens;
  const PanelKernels& panel = kernels_.split.panel[job.keys.format];
  queries_ = arena.take_areas<uint16_t>(queries * 2 * dim_steps_ * kPairColumns, workers);
  weights_ = arena.take_areas<uint16_t>(kFewQueries * 2 * kAttendKeys, workers);
  keys_ = arena.take_areas<uint8_t>(kMostSteps * panel.bytes(dim_), workers);
  values_ = arena.take_areas<uint8_t>(dim_steps_ * panel.bytes(kAttendKeys), workers);
  scratch_ = arena.take_areas<uint8_t>(panel.scratch, workers);
  scores_ = arena.take_areas<float>(kFewQueries * kAttendKeys, workers);
  parts_ = arena.take_areas<float>(Sums::size(kFewQueries, dim_), workers);
  totals_ = arena.take_areas<float>(Sums::size(queries, dim_), workers);
  items_.reset(job.kv_heads * parts_of(job.tokens, block_tokens_), 1);
  write_items_.reset(job.tokens * job.kv_heads, 16);
}

PanelAttention::Desk PanelAttention::desk(int worker) const {
  return {queries_.of(worker),
          weights_.of(worker),
          keys_.of(worker),
          values_.of(worker),
          scratch_.of(worker),
          scores_.of(worker),
          Sums(parts_.of(worker), kFewQueries, dim_),
          Sums(totals_.of(worker), block_tokens_ * group_, dim_)};
}

PanelAttention::Span PanelAttention::span(int64_t chunk, int64_t t0, int64_t t1) const {
  const int64_t origin = chunk * kAttendKeys;
  const int64_t from = std::max(origin, job_.visible_from(t0));
  const int64_t to = std::min(origin + kAttendKeys, job_.start + t1);
  const int64_t first = from / kKeysOfStep * kKeysOfStep;
  return {first, from, to, parts_of(to - first, kKeysOfStep)};
}

void PanelAttention::split_queries(int64_t head, int64_t t0, int64_t t1, const Desk& desk) const {
  const int64_t queries = (t1 - t0) * group_, size = kGroupTokens * 2 * dim_steps_ * kPairColumns;
  float* together = desk.total.acc;
  for (int64_t t = t0; t < t1; ++t) {
    const float* from = job_.q + (t * job_.heads + head * group_) * dim_;
    std::copy(from, from + group_ * dim_, together + (t - t0) * group_ * dim_);
  }
  for (int64_t i = 0; i < queries; i += kGroupTokens)
    kernels_.split_tokens(together + i * dim_, dim_, std::min<int64_t>(queries - i, kGroupTokens), dim_,
                          desk.queries + i / kGroupTokens * size);
}

void PanelAttention::pack(int64_t head, const Span& span, const Desk& desk) const {
  const PanelKernels& panel = kernels_.split.panel[job_.keys.format];
  const Rows keys{job_.keys.row(head, span.first), job_.keys.row_bytes, nullptr, span.to - span.first};
  for (int64_t s = 0; s < span.steps; ++s)
    panel.pack(keys, s * kKeysOfStep, std::min((s + 1) * kKeysOfStep, keys.count), dim_,
               desk.keys + s * panel.bytes(dim_));
  int32_t places[kAttendKeys];
  std::iota(places, places + span.steps * kKeysOfStep, 0);
  std::fill(places, places + (span.from - span.first), -1);
  std::fill(places + keys.count, places + span.steps * kKeysOfStep, -1);
  const Rows values{job_.values.row(head, span.first), job_.values.row_bytes, places};
  const int64_t bytes = panel.bytes(span.steps * kKeysOfStep);
  for (int64_t c = 0; c < dim_; c += kAcrossColumns)
    kernels_.split.pack_across[job_.values.format](values, span.steps, c, std::min(c + kAcrossColumns, dim_),
                                                   dim_, desk.values + c / kPanelRows * bytes);
}

// Adds the keys of a span to the sums of `count` queries of the block from t0 on, the first of which is a
// multiple of kFewQueries.
void PanelAttention::attend(int64_t t0, int64_t query, int64_t count, const Span& span,
                            const Desk& desk) const {
  const int64_t from = job_.visible_from(t0 + query / group_);
  const int64_t to = std::min(job_.start + t0 + (query + count - 1) / group_ + 1, span.to);
  if (from >= span.to || to <= span.first) return;
  const PanelKernels& panel = kernels_.split.panel[job_.keys.format];
  const int64_t columns = span.steps * kKeysOfStep;
  Tokens queries{};
  queries.split = desk.queries + query * 2 * dim_steps_ * kPairColumns;
  const DotJob scores{{}, dim_, queries, desk.scores, kAttendKeys, nullptr, false};
  const int64_t seen = parts_of(to - span.first, kKeysOfStep) * kKeysOfStep;
  panel.dot(scores, desk.keys, 0, seen, count, desk.scratch);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = t0 + (query + i) / group_;
    float* row = desk.scores + i * kAttendKeys;
    const int64_t first = std::clamp<int64_t>(job_.visible_from(t) - span.first, 0, columns);
    const int64_t last = std::clamp<int64_t>(job_.start + t + 1 - span.first, first, span.to - span.first);
    const int64_t steps = parts_of(last, kStep) * kStep;
    soften(kernels_, job_, row, first, last, steps, desk.part, i);
    std::fill(row + steps, row + columns, 0.0f);
  }
  for (int64_t i = 0; i < count; i += kGroupTokens)
    kernels_.split_tokens(desk.scores + i * kAttendKeys, kAttendKeys,
                          std::min<int64_t>(count - i, kGroupTokens), columns,
                          desk.weights + i * 2 * columns);
  Tokens weights{};
  weights.split = desk.weights;
  const DotJob sums{{}, columns, weights, desk.part.acc, dim_, nullptr, false};
  panel.dot(sums, desk.values, 0, dim_, count, desk.scratch);
  for (int64_t i = 0; i < count; ++i) desk.total.merge(kernels_, query + i, desk.part, i, dim_);
}

void PanelAttention::attend_block(int64_t item, const Desk& desk) const {
  // The last blocks see the most keys: they are handed out first.
  const int64_t blocks = parts_of(job_.tokens, block_tokens_);
  const int64_t head = item % job_.kv_heads, block = blocks - 1 - item / job_.kv_heads;
  const int64_t t0 = block * block_tokens_, t1 = std::min(t0 + block_tokens_, job_.tokens);
  const int64_t queries = (t1 - t0) * group_;
  split_queries(head, t0, t1, desk);
  desk.total.clear(queries, dim_);
  for (int64_t c = job_.visible_from(t0) / kAttendKeys; c <= (job_.start + t1 - 1) / kAttendKeys; ++c) {
    const Span keys = span(c, t0, t1);
    pack(head, keys, desk);
    for (int64_t i = 0; i < queries; i += kFewQueries)
      attend(t0, i, std::min(kFewQueries, queries - i), keys, desk);
  }
  for (int64_t i = 0; i < queries; ++i) finish(job_, head, t0, i, desk.total, i);
}

void PanelAttention::run() {
  team_.run([&](int worker) {
    write_items_.drain([&](int64_t begin, int64_t end) { write_cache(kernels_, job_, begin, end); });
    team_.barrier();
    items_.drain([&](int64_t item, int64_t) { attend_block(item, desk(worker)); });
  });
}

}  // namespace thermocline
