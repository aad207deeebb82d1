#include "down.h"

#include <algorithm>
#include <numeric>

namespace thermocline {
namespace {

// A tile of weights, kTileRows by kTileColumns floats, stays in the second cache (128 KB) for all tokens.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileColumns = kListColumns;
constexpr int64_t kTokenBlock = 32;
constexpr int64_t kReduceColumns = 512;
// Narrower pieces of a row would waste the cache lines at their ends.
constexpr int64_t kFewestColumns = 256;
constexpr int64_t kColumnUnit = 128;  // a step of the kernels

// body(group, begin, end) for the neurons of each cluster; ids ascend.
template <class Body>
void for_clusters(const int32_t* ids, int64_t count, Body body) {
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const int64_t cluster = (ids ? ids[begin] : begin) >> kClusterShift, past = (cluster + 1)
                                                                                << kClusterShift;
    if (ids) {
      while (end < count && ids[end] < past) ++end;
    } else {
      end = std::min(past, count);
    }
    body(static_cast<int>(cluster % kGroups), begin, end);
  }
}

}  // namespace

DownRecords::DownRecords(Context& context, Pool& team, const Matrix& down, const LargestScales* largest,
                         int64_t tokens, int64_t most, bool weighed)
    : context_(context), team_(team), down_(down), tokens_(tokens) {
  if (DownPanels::pays(context.kernels, down.format, tokens)) {
    panels_.emplace(context, team, down, tokens);
    return;
  }
  if (is_integer(down.format)) {
    sums_.emplace(context, team, down, largest, tokens, most, weighed);
    return;
  }
  ids_ = context.arena.take<int32_t>(most);
  positions_ = context.arena.take<int32_t>(most);
  const int64_t wanted_items = 4 * static_cast<int64_t>(team.size());
  if (tokens == 1) {
    parts_ = context.arena.take<float>(kGroups * down.cols);
    const int64_t most_parts = std::max<int64_t>(down.cols / kFewestColumns, 1);
    column_parts_ = std::clamp<int64_t>(wanted_items / kGroups, 1, most_parts);
    tile_columns_ = parts_of(parts_of(down.cols, column_parts_), kColumnUnit) * kColumnUnit;
    token_parts_ = 1;
  } else {
    tile_columns_ = kTileColumns;
    column_parts_ = parts_of(down.cols, kTileColumns);
    token_parts_ = std::clamp<int64_t>(parts_of(wanted_items, std::max<int64_t>(column_parts_, 1)), 1,
                                       parts_of(tokens, kTokenBlock));
    most_ = most;
    fired_ = context.arena.take<int32_t>(tokens * (most + 1));
    scratch_ = context.arena.take_areas<float>(
        kTileColumns * kTileRows + (2 * kTileColumns + 1) * parts_of(tokens, token_parts_), team.size());
    token_items_.reset(tokens, 1);
  }
}

void DownRecords::list(const int32_t* ids, const int32_t* rows, const uint8_t* wanted, int64_t count,
                       const float* h, int64_t h_stride) {
  if (panels_) return panels_->list(ids, rows, wanted, count, h, h_stride);
  if (sums_) return sums_->list(ids, rows, wanted, count, h, h_stride);
  h_ = h;
  h_stride_ = h_stride;
  std::fill(start_, start_ + kGroups + 1, 0);
  for_clusters(ids, count, [&](int group, int64_t begin, int64_t end) {
    start_[group + 1] += wanted ? std::accumulate(wanted + begin, wanted + end, int64_t{0}) : end - begin;
  });
  for (int g = 0; g < kGroups; ++g) start_[g + 1] += start_[g];
  int64_t next[kGroups];
  std::copy(start_, start_ + kGroups, next);
  const int32_t* row = rows ? rows : ids;
  for_clusters(ids, count, [&](int group, int64_t begin, int64_t end) {
    int64_t at = next[group];
    for (int64_t i = begin; i < end; ++i) {
      if (wanted && !wanted[i]) continue;
      ids_[at] = row ? row[i] : static_cast<int32_t>(i);
      positions_[at++] = static_cast<int32_t>(i);
    }
    next[group] = at;
  });
  items_.reset(column_parts_ * (tokens_ == 1 ? kGroups : token_parts_), 1);
  reduce_.reset(down_.cols, kReduceColumns);
}

void DownRecords::add(int worker, float* out) {
  if (panels_) return panels_->add(worker, out);
  if (sums_) return sums_->add(worker, out);
  if (tokens_ == 1) return add_one(out);
  token_items_.drain([&](int64_t t, int64_t) { find_fired(t); });
  team_.barrier();
  items_.drain([&](int64_t item, int64_t) { add_tile(worker, item, out); });
}

void DownRecords::add_one(float* out) {
  const AxpyJob job{
      down_.at(ids_, start_[kGroups], context_.fetching), positions_, h_, h_stride_, nullptr, down_.cols};
  items_.drain([&](int64_t item, int64_t) {
    const int64_t group = item % kGroups;
    const int64_t c0 = std::min(item / kGroups * tile_columns_, down_.cols);
    const int64_t c1 = std::min(c0 + tile_columns_, down_.cols);
    AxpyJob part = job;
    part.acc = parts_ + group * down_.cols + c0;
    std::fill(part.acc, part.acc + (c1 - c0), 0.0f);
    context_.kernels.axpy[down_.format](part, start_[group], start_[group + 1], 0, 1, c0, c1);
  });
  team_.barrier();
  reduce_.drain([&](int64_t begin, int64_t end) {
    context_.kernels.reduce(parts_ + begin, kGroups, down_.cols, out + begin, end - begin);
  });
}

void DownRecords::find_fired(int64_t t) {
  const float* h = h_ + t * h_stride_;
  int32_t* fired = fired_ + t * (most_ + 1);
  int64_t count = 0;
  for (int64_t k = 0; k < start_[kGroups]; ++k) {
    fired[count] = static_cast<int32_t>(k);
    count += h[positions_[k]] != 0.0f;
  }
  fired[count] = static_cast<int32_t>(start_[kGroups]);
}

void DownRecords::add_tile(int worker, int64_t item, float* out) {
  const Kernels& kernels = context_.kernels;
  const int64_t c0 = item % column_parts_ * kTileColumns, c1 = std::min(c0 + kTileColumns, down_.cols);
  const int64_t size = parts_of(tokens_, token_parts_);
  const int64_t t0 = std::min(item / column_parts_ * size, tokens_), t1 = std::min(t0 + size, tokens_);
  float* numbers = scratch_.of(worker);
  float* sums = numbers + kTileRows * kTileColumns;
  float* total = sums + size * kTileColumns;
  auto* next = reinterpret_cast<int32_t*>(total + size * kTileColumns);  // of each token, in its list
  const int64_t floats = (t1 - t0) * kTileColumns;

  if (c1 - c0 < kTileColumns) std::fill(numbers, sums, 0.0f);
  std::fill(total, total + floats, 0.0f);
  std::fill(next, next + (t1 - t0), 0);
  for (int g = 0; g < kGroups; ++g) {
    std::fill(sums, sums + floats, 0.0f);
    for (int64_t k = start_[g]; k < start_[g + 1]; k += kTileRows) {
      const int64_t rows = std::min(kTileRows, start_[g + 1] - k);
      kernels.dequantize[down_.format](down_.at(ids_, k + rows), k, k + rows, c0, c1, numbers, kTileColumns);
      for (int64_t t = t0; t < t1; ++t) {
        const ListJob job{numbers, k, k + rows, fired_ + t * (most_ + 1), positions_, h_ + t * h_stride_};
        next[t - t0] = kernels.add_listed(job, next[t - t0], sums + (t - t0) * kTileColumns);
      }
    }
    for (int64_t i = 0; i < floats; ++i) total[i] += sums[i];
  }
  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t c = c0; c < c1; ++c) out[t * down_.cols + c] += total[(t - t0) * kTileColumns + c - c0];
  }
}

}  // namespace thermocline
