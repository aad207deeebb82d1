#include "down_sums.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "linear.h"

namespace thermocline {
namespace {

// A tile of weights stays in the second cache while the tokens of a block meet it.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileSteps = 4;
constexpr int64_t kTileColumns = kTileSteps * kSumColumns;
constexpr int64_t kTokenBlock = 32;
constexpr int64_t kRowUnit = 8;  // rows that kernels take together

// By their bits, as the kernels compare: a NaN is larger than any number, and what has a sign than that.
void keep_larger(float& to, float other) {
  if (std::bit_cast<uint32_t>(other) > std::bit_cast<uint32_t>(to)) to = other;
}

}  // namespace

DownSums::DownSums(Context& context, Pool& team, const Matrix& down, const LargestScales* largest,
                   int64_t tokens, int64_t most, bool weighed)
    : context_(context),
      team_(team),
      down_(down),
      tokens_(tokens),
      most_(most),
      steps_(parts_of(down.cols, kSumColumns)),
      kept_(largest),
      weigh_(weighed && largest && tokens == 1),
      streams_(context.streams(team)) {
  Arena& arena = context.arena;
  listed_rows_ = arena.take<int32_t>(most);
  listed_positions_ = arena.take<int32_t>(most);
  largest_ = kept_ ? *largest : LargestScales{arena.take<float>(most), arena.take<float>(most)};
  scales_ = arena.take<Scale>(tokens);
  int64_t sums = steps_;
  if (tokens > 1) {
    const int64_t wanted_items = 4 * static_cast<int64_t>(team.size());
    column_parts_ = parts_of(steps_, kTileSteps);
    token_parts_ = std::max(parts_of(tokens, kTokenBlock),
                            std::min(tokens, parts_of(wanted_items, std::max<int64_t>(column_parts_, 1))));
    fired_ = arena.take<int32_t>(tokens * (most + 1));
    sums = parts_of(tokens, token_parts_) * kTileSteps;
  }
  if (weigh_) {
    weighed_ = arena.take_areas<LargestScale>(1, team.size());
    for (int w = 0; w < team.size(); ++w) *weighed_.of(w) = {0.0f, 0.0f};
  }
  sums_ = arena.take_areas<SumStep>(sums, team.size());
}

void DownSums::list(const int32_t* ids, const int32_t* rows, const uint8_t* wanted, int64_t count,
                    const float* h, int64_t h_stride) {
  h_ = h;
  h_stride_ = h_stride;
  rows_ = rows ? rows : ids;
  positions_ = nullptr;
  count_ = count;
  if (wanted) {
    count_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      listed_rows_[count_] = static_cast<int32_t>(row(i));
      listed_positions_[count_] = static_cast<int32_t>(i);
      count_ += wanted[i];
    }
    rows_ = listed_rows_;
    positions_ = listed_positions_;
  }
  measured_ = kept_;
  if (tokens_ == 1 && kept_) {
    scales_[0] = weigh_ ? scale_from(heaviest()) : scale_of(0, nullptr, count_);
    measured_ = scales_[0].known;
  }
  if (tokens_ > 1) {
    for (int64_t k = 0; measured_ && k < count_; ++k) measured_ = !std::signbit(largest_.scale[row(k)]);
  }
  const int64_t grain = row_grain(count_, down_.row_bytes, 1, team_.size());
  measure_items_.reset(count_, grain);
  streams_.reset(count_, parts_of(grain, kRowUnit) * kRowUnit, true);
  token_items_.reset(tokens_, 1);
  items_.reset(column_parts_ * token_parts_, 1);
}

void DownSums::measure(int64_t k0, int64_t k1) {
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t place = kept_ ? row(k) : k;
    if (kept_ && !std::signbit(largest_.scale[place])) continue;
    const LargestScale found =
        context_.kernels.largest_scale[down_.format](down_.data + row(k) * down_.row_bytes, down_.cols);
    largest_.scale[place] = found.scale;
    if (has_minima(down_.format)) largest_.least[place] = found.least;
  }
}

DownSums::Scale DownSums::scale_of(int64_t t, const int32_t* list, int64_t count) const {
  const float* h = h_ + t * h_stride_;
  const FactorJob job{h, positions_, list, kept_ ? rows_ : nullptr};
  const auto largest = [&](const float* scales) {
    return context_.kernels.largest_factor(job, scales, count);
  };
  return scale_from({largest(largest_.scale), has_minima(down_.format) ? largest(largest_.least) : 0.0f});
}

DownSums::Scale DownSums::scale_from(const LargestScale& factor) {
  const auto per = [](double most) { return most > 0 ? kLargestFactor / most : 0.0; };
  return {per(factor.scale),
          per(factor.least),
          {double{factor.scale} / kLargestFactor, double{factor.least} / kLargestFactor},
          std::isfinite(factor.scale) && std::isfinite(factor.least),
          !std::signbit(factor.scale)};
}

void DownSums::weigh(int worker, const int32_t* rows, const float* h, int64_t k0, int64_t k1) {
  if (!weigh_) return;
  const FactorJob job{h + k0, nullptr, nullptr, rows ? rows + k0 : nullptr};
  const auto weigh_by = [&](float& most, const float* scales) {
    keep_larger(most, context_.kernels.largest_factor(job, rows ? scales : scales + k0, k1 - k0));
  };
  weigh_by(weighed_.of(worker)->scale, largest_.scale);
  if (has_minima(down_.format)) weigh_by(weighed_.of(worker)->least, largest_.least);
}

LargestScale DownSums::heaviest() const {
  LargestScale most = *weighed_.of(0);
  for (int w = 1; w < team_.size(); ++w) {
    keep_larger(most.scale, weighed_.of(w)->scale);
    keep_larger(most.least, weighed_.of(w)->least);
  }
  return most;
}

SumJob DownSums::job_of(int64_t t, const int32_t* list, SumStep* sums) const {
  return {down_.at(rows_, count_, context_.fetching),
          list,
          positions_,
          h_ + t * h_stride_,
          scales_[t].per_factor,
          scales_[t].per_least,
          sums};
}

void DownSums::add(int worker, float* out) {
  if (!measured_) {
    measure_items_.drain([&](int64_t k0, int64_t k1) { measure(k0, k1); });
    team_.barrier([&] {
      if (tokens_ == 1) scales_[0] = scale_of(0, nullptr, count_);
    });
  }
  if (tokens_ == 1) return add_one(worker, out);
  token_items_.drain([&](int64_t t, int64_t) { begin_token(t); });
  team_.barrier();
  items_.drain([&](int64_t item, int64_t) { add_tile(worker, item, out); });
}

void DownSums::add_one(int worker, float* out) {
  SumStep* sums = sums_.of(worker);
  std::memset(static_cast<void*>(sums), 0, static_cast<size_t>(steps_) * sizeof(SumStep));
  const SumJob job = job_of(0, nullptr, sums);
  if (scales_[0].finite) {
    streams_.drain(worker, [&](int64_t k0, int64_t k1) {
      context_.kernels.add_sums[down_.format](job, k0, k1, 0, down_.cols);
    });
  }
  team_.barrier();
  finish_one(worker, out);
}

// What others wrote is asked for at once, for a core answers another one late.
void DownSums::finish_one(int worker, float* out) {
  const int64_t s0 = steps_ * worker / team_.size(), s1 = steps_ * (worker + 1) / team_.size();
  if (s0 == s1) return;
  for (int w = 0; w < team_.size(); ++w) {
    const auto* from = reinterpret_cast<const uint8_t*>(sums_.of(w) + s0);
    for (size_t i = 0; i < static_cast<size_t>(s1 - s0) * sizeof(SumStep); i += 64)
      __builtin_prefetch(from + i);
  }
  finish(0, sums_.data + s0, team_.size(), s0 * kSumColumns, std::min(s1 * kSumColumns, down_.cols), out);
}

void DownSums::begin_token(int64_t t) {
  const float* h = h_ + t * h_stride_;
  int32_t* fired = fired_ + t * (most_ + 1);
  int64_t count = 0;
  for (int64_t k = 0; k < count_; ++k) {
    fired[count] = static_cast<int32_t>(k);
    count += h[positions_ ? positions_[k] : k] != 0.0f;
  }
  scales_[t] = scale_of(t, fired, count);
  fired[count] = static_cast<int32_t>(count_);
}

void DownSums::add_tile(int worker, int64_t item, float* out) {
  const int64_t c0 = item % column_parts_ * kTileColumns, c1 = std::min(c0 + kTileColumns, down_.cols);
  const int64_t size = parts_of(tokens_, token_parts_);
  const int64_t t0 = std::min(item / column_parts_ * size, tokens_), t1 = std::min(t0 + size, tokens_);
  SumStep* sums = sums_.of(worker);
  std::memset(static_cast<void*>(sums), 0, static_cast<size_t>((t1 - t0) * kTileSteps) * sizeof(SumStep));
  int64_t next[kTokenBlock] = {};  // of each token, in its list
  for (int64_t end = kTileRows; end < count_ + kTileRows; end += kTileRows) {
    for (int64_t t = t0; t < t1; ++t) {
      const int32_t* fired = fired_ + t * (most_ + 1);
      int64_t& k = next[t - t0];
      const int64_t begin = k;
      while (fired[k] < std::min(end, count_)) ++k;
      if (begin == k || !scales_[t].finite) continue;
      const SumJob job = job_of(t, fired, sums + (t - t0) * kTileSteps);
      context_.kernels.add_sums[down_.format](job, begin, k, c0, c1);
    }
  }
  for (int64_t t = t0; t < t1; ++t) finish(t, sums + (t - t0) * kTileSteps, 1, c0, c1, out);
}

void DownSums::finish(int64_t t, const SumStep* parts, int64_t count, int64_t c0, int64_t c1,
                      float* out) const {
  float* to = out + t * down_.cols + c0;
  if (!scales_[t].finite) {
    std::fill(to, to + c1 - c0, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  context_.kernels.finish_sums[down_.format](parts, count, sums_.stride, scales_[t].units, c1 - c0, to);
}

}  // namespace thermocline
