#include "down_panels.h"

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace thermocline {
namespace {

constexpr int64_t kStep = kPairColumns;

// Calls body(i, id, begins) for each neuron that is wanted; `begins` says that it is the first of its step.
template <class Body>
void for_wanted(const int32_t* ids, const uint8_t* wanted, int64_t count, Body body) {
  int64_t step = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (wanted && !wanted[i]) continue;
    const int64_t id = ids ? ids[i] : i;
    body(i, id, id / kStep != step);
    step = id / kStep;
  }
}

}  // namespace

bool DownPanels::pays(const Kernels& kernels, Format format, int64_t tokens) {
  return kernels.pack_across[format] && has_panel(kernels, format, tokens);
}

DownPanels::DownPanels(Context& context, Pool& team, const Matrix& down, int64_t tokens)
    : context_(context), team_(team), down_(down), tokens_(tokens) {
  if (context.kernels.panel[down.format].form == kSplit) parts_ = 2;
  const int64_t wanted_items = 4 * static_cast<int64_t>(team.size());
  column_parts_ = parts_of(down.cols, kAcrossColumns);
  token_parts_ = std::clamp<int64_t>(parts_of(wanted_items, std::max<int64_t>(column_parts_, 1)), 1,
                                     parts_of(tokens, 2 * kGroupTokens));
  groups_.reset(parts_of(tokens, kGroupTokens), 1);
  items_.reset(column_parts_ * token_parts_, 1);
}

void DownPanels::list(const int32_t* ids, const int32_t* rows, const uint8_t* wanted, int64_t count,
                      const float* h, int64_t h_stride) {
  Arena& arena = context_.arena;
  h_ = h;
  h_stride_ = h_stride;
  steps_ = 0;
  for_wanted(ids, wanted, count, [&](int64_t, int64_t, bool begins) { steps_ += begins; });
  rows_ = arena.take<int32_t>(steps_ * kStep);
  sources_ = arena.take<int32_t>(steps_ * kStep);
  std::fill(rows_, rows_ + steps_ * kStep, -1);
  std::fill(sources_, sources_ + steps_ * kStep, -1);
  int64_t begin = -kStep;
  for_wanted(ids, wanted, count, [&](int64_t i, int64_t id, bool begins) {
    if (begins) begin += kStep;
    const auto place = static_cast<int32_t>(i);
    sources_[begin + id % kStep] = place;
    rows_[begin + id % kStep] = rows ? rows[i] : ids ? ids[i] : place;
  });
  wide_size_ = kGroupTokens * steps_ * kStep;
  pairs_ = arena.take<uint16_t>(parts_of(tokens_, kGroupTokens) * parts_ * wide_size_);
  wide_ = arena.take_areas<float>(wide_size_, team_.size());
  const PanelKernels& panel = context_.kernels.panel[down_.format];
  panels_ = arena.take_areas<uint8_t>(
      kAcrossColumns / kPanelRows * panel.bytes(steps_ * kStep) + panel.scratch, team_.size());
}

void DownPanels::pair_group(int worker, int64_t group) {
  const int64_t t0 = group * kGroupTokens, count = std::min<int64_t>(tokens_ - t0, kGroupTokens);
  const int64_t width = steps_ * kStep;
  float* wide = wide_.of(worker);
  for (int64_t s = 0; s < width; s += kStep) {
    const int32_t* source = sources_ + s;
    const bool together = source[0] >= 0 && source[kStep - 1] == source[0] + kStep - 1;
    for (int64_t t = 0; t < count; ++t) {
      const float* h = h_ + (t0 + t) * h_stride_;
      float* to = wide + t * width + s;
      if (together) {
        std::memcpy(to, h + source[0], kStep * sizeof(float));
      } else {
        for (int64_t i = 0; i < kStep; ++i) to[i] = source[i] < 0 ? 0.0f : h[source[i]];
      }
    }
  }
  const Kernels& kernels = context_.kernels;
  const auto to_pairs = parts_ == 2 ? kernels.split_tokens : kernels.pair_tokens;
  to_pairs(wide, width, count, width, pairs_ + group * parts_ * wide_size_);
}

void DownPanels::add_part(int worker, int64_t item, float* out) {
  const Kernels& kernels = context_.kernels;
  const int64_t c0 = item % column_parts_ * kAcrossColumns, c1 = std::min(c0 + kAcrossColumns, down_.cols);
  const int64_t size = parts_of(parts_of(tokens_, kGroupTokens), token_parts_) * kGroupTokens;
  const int64_t t0 = std::min(item / column_parts_ * size, tokens_), t1 = std::min(t0 + size, tokens_);
  if (t0 == t1) return;
  uint8_t* panels = panels_.of(worker);
  kernels.pack_across[down_.format](down_.at(rows_, steps_ * kStep), steps_, c0, c1, down_.cols, panels);
  Tokens tokens{};
  (parts_ == 2 ? tokens.split : tokens.pairs) = pairs_ + t0 * parts_ * steps_ * kStep;
  const DotJob job{{}, steps_ * kStep, tokens, out + t0 * down_.cols, down_.cols, nullptr, true};
  const PanelKernels& panel = kernels.panel[down_.format];
  panel.dot(job, panels, c0, c1, t1 - t0, panels + kAcrossColumns / kPanelRows * panel.bytes(steps_ * kStep));
}

void DownPanels::add(int worker, float* out) {
  groups_.drain([&](int64_t group, int64_t) { pair_group(worker, group); });
  team_.barrier();
  items_.drain([&](int64_t item, int64_t) { add_part(worker, item, out); });
}

}  // namespace thermocline
