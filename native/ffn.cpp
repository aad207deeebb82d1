#include "ffn.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "down.h"
#include "linear.h"

namespace thermocline {
namespace {

// Tokens computed at once, so that the activations of a long prompt need at most this much scratch.
constexpr int64_t kSliceBytes = int64_t{64} << 20;
constexpr int64_t kFewestTokens = 16;

// The FFN of some tokens, in the phases that run() lists. Neurons are counted three ways: an `id` in the
// block, a `position` in the active set, and a place among the `kept`, whose gate opened.
class Slice {
 public:
  Slice(Context& context, Pool& team, const FfnBlock& block, const float* x, int64_t tokens,
        const int32_t* active, int64_t n_active, bool skip)
      : context_(context),
        team_(team),
        block_(block),
        active_(active),
        count_(n_active),
        tokens_(tokens),
        compact_(skip && block.gate),
        skip_(skip),
        x_(context, x, tokens, block.up->cols, forms_of(context.kernels, block, tokens)),
        kept_(n_active),
        first_items_(context.streams(team)),
        second_items_(context.streams(team)),
        down_items_(context.streams(team)) {
    Arena& arena = context.arena;
    first_ = arena.take<float>(tokens * count_);
    h_ = block.gate ? arena.take<float>(tokens * count_) : first_;
    opened_ = arena.take<uint8_t>(count_);
    wanted_ = arena.take<uint8_t>(count_);
    if (compact_) {
      kept_positions_ = arena.take<int32_t>(count_);
      kept_ids_ = arena.take<int32_t>(count_);
    }
    if (block.rows) {
      int32_t* rows = arena.take<int32_t>(count_);
      for (int64_t p = 0; p < count_; ++p) rows[p] = block.rows[active ? active[p] : p];
      active_rows_ = rows;
      if (compact_) kept_rows_ = arena.take<int32_t>(count_);
    }
    int64_t scratch_size =
        std::max(dot_scratch(context.kernels, block.up->format, block.up->cols, tokens),
                 block.gate ? dot_scratch(context.kernels, block.gate->format, block.gate->cols, tokens) : 0);
    if (block.records) {
      records_.emplace(context, team, *block.down, block.largest, tokens, count_, block.gate != nullptr);
    } else {
      scratch_size =
          std::max(scratch_size, dot_scratch(context.kernels, block.down->format, block.down->cols, tokens));
      full_ = active ? arena.take<float>(tokens * block.neurons) : h_;
      full_batch_.emplace(context, full_, tokens, block.neurons,
                          form_of(context.kernels, block.down->format, tokens));
      down_items_.reset(block.down->rows,
                        row_grain(block.down->rows, block.down->row_bytes, tokens, team.size()), tokens == 1);
    }
    scratch_ = arena.take_areas<float>(scratch_size, team.size());
    const int64_t grain = row_grain(count_, block.up->row_bytes, tokens, team.size());
    first_items_.reset(count_, grain, tokens == 1);
    second_items_.reset(count_, grain, tokens == 1);
    token_items_.reset(tokens, 1);
  }

  void run(float* out, float* hidden) {
    team_.run([&](int worker) {
      float* scratch = scratch_.of(worker);
      if (first_items_.begin(worker) < count_)
        fetch(first_matrix().data + first_row(worker) * first_matrix().row_bytes);
      x_.prepare(context_, team_);
      first_items_.drain(worker, [&](int64_t p0, int64_t p1) { open(p0, p1, scratch); });
      if (block_.gate) {
        team_.barrier([&] {
          if (compact_) keep_open();
        });
        second_items_.drain(worker, [&](int64_t k0, int64_t k1) { finish(worker, k0, k1, scratch); });
      }
      if (block_.records) {
        team_.barrier(
            [&] { records_->list(ids(), rows(ids()), all_wanted() ? nullptr : wanted_, kept_, h_, count_); });
        if (hidden) token_items_.drain([&](int64_t t, int64_t) { spread(t, hidden); });
        records_->add(worker, out);
      } else {
        team_.barrier();
        add_standard(worker, scratch, out, hidden);
      }
    });
  }

  // Positions whose gate opened, and whose activation is not zero, for any token.
  void mark(uint8_t* opened, uint8_t* nonzero) const {
    for (int64_t p = 0; p < count_; ++p) opened[p] |= opened_[p];
    for (int64_t k = 0; k < kept_; ++k) nonzero[position(k)] |= wanted_[k];
  }
  int64_t fired() const { return fired_.load(); }

 private:
  static unsigned forms_of(const Kernels& kernels, const FfnBlock& block, int64_t tokens) {
    const unsigned up = form_of(kernels, block.up->format, tokens);
    return block.gate ? up | form_of(kernels, block.gate->format, tokens) : up;
  }

  const int32_t* ids() const { return compact_ ? kept_ids_ : active_; }
  int64_t position(int64_t k) const { return compact_ ? kept_positions_[k] : k; }

  // Where neurons lie in the matrices; `ids` are the active or the kept ones.
  const int32_t* rows(const int32_t* ids) const {
    if (!block_.rows) return ids;
    return compact_ && ids == kept_ids_ ? kept_rows_ : active_rows_;
  }

  void project(const Matrix& matrix, const int32_t* ids, int64_t count, float* out, int64_t r0, int64_t r1,
               float* scratch) {
    const DotJob job{matrix.at(rows(ids), count, context_.fetching),
                     matrix.cols,
                     x_.tokens(),
                     out,
                     count_,
                     nullptr,
                     false};
    dot_chunk(context_.kernels, matrix.format, job, r0, r1, tokens_, scratch);
  }

  // The up projection, with its bias where there is one.
  void project_up(const int32_t* ids, int64_t count, float* out, int64_t r0, int64_t r1, float* scratch) {
    project(*block_.up, ids, count, out, r0, r1, scratch);
    if (!block_.up_bias) return;
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t r = r0; r < r1; ++r) out[t * count_ + r] += block_.up_bias[ids ? ids[r] : r];
    }
  }

  void activate(float* values, int64_t r0, int64_t r1) {
    for (int64_t t = 0; t < tokens_; ++t) {
      context_.kernels.activate(block_.activation, block_.threshold, values + t * count_ + r0, r1 - r0);
    }
  }

  const Matrix& first_matrix() const { return block_.gate ? *block_.gate : *block_.up; }
  int64_t first_row(int worker) const {
    const int32_t* at = rows(active_);
    return at ? at[first_items_.begin(worker)] : first_items_.begin(worker);
  }

  // Positions p0 .. p1: the activated gate, or h if there is no gate.
  void open(int64_t p0, int64_t p1, float* scratch) {
    if (block_.gate) {
      project(*block_.gate, active_, count_, first_, p0, p1, scratch);
    } else {
      project_up(active_, count_, first_, p0, p1, scratch);
    }
    activate(first_, p0, p1);
    const int64_t open = flag(first_, p0, p1, opened_);
    if (block_.gate) return;
    std::copy(opened_ + p0, opened_ + p1, wanted_ + p0);
    fired_.fetch_add(open, std::memory_order_relaxed);
  }

  void keep_open() {
    kept_ = context_.kernels.list_flags(opened_, count_, kept_positions_);
    for (int64_t k = 0; k < kept_; ++k) {
      const int32_t p = kept_positions_[k];
      kept_ids_[k] = active_ ? active_[p] : p;
      if (kept_rows_) kept_rows_[k] = active_rows_[p];
    }
    second_items_.reset(kept_, row_grain(kept_, block_.up->row_bytes, tokens_, team_.size()), tokens_ == 1);
  }

  // h of the kept neurons k0 .. k1.
  void finish(int worker, int64_t k0, int64_t k1, float* scratch) {
    project_up(ids(), kept_, h_, k0, k1, scratch);
    gate(k0, k1);
    if (records_) records_->weigh(worker, rows(ids()), h_, k0, k1);
    fired_.fetch_add(flag(h_, k0, k1, wanted_), std::memory_order_relaxed);
  }

  bool all_wanted() const { return !skip_ || (tokens_ == 1 && fired_.load() == kept_); }

  // h = gate * up, as if neurons whose gate is closed had been skipped.
  void gate(int64_t k0, int64_t k1) {
    if (block_.both) activate(h_, k0, k1);
    for (int64_t t = 0; t < tokens_; ++t) {
      const float* gates = first_ + t * count_;
      float* h = h_ + t * count_ + k0;
      if (compact_) {
        context_.kernels.close_gates(gates, kept_positions_ + k0, h, k1 - k0);
      } else {
        context_.kernels.close_gates(gates + k0, nullptr, h, k1 - k0);
      }
    }
  }

  // flags[i] = whether column i is not zero for some token; returns how many values are not.
  int64_t flag(const float* values, int64_t i0, int64_t i1, uint8_t* flags) const {
    int64_t total = 0;
    std::memset(flags + i0, 0, static_cast<size_t>(i1 - i0));
    for (int64_t t = 0; t < tokens_; ++t)
      total += context_.kernels.flag_nonzero(values + t * count_ + i0, i1 - i0, flags + i0);
    return total;
  }

  // h of a token, as it lies among the kept, to its place among all neurons of the block.
  void spread(int64_t token, float* to) const {
    const float* h = h_ + token * count_;
    float* row = to + token * block_.neurons;
    const int32_t* id = ids();
    if (!id) {
      std::copy(h, h + block_.neurons, row);
      return;
    }
    std::fill(row, row + block_.neurons, 0.0f);
    for (int64_t k = 0; k < kept_; ++k) row[id[k]] = h[k];
  }

  void add_standard(int worker, float* scratch, float* out, float* hidden) {
    token_items_.drain([&](int64_t t, int64_t) {
      if (active_) spread(t, full_);
      if (hidden) spread(t, hidden);
    });
    if (active_) team_.barrier();
    full_batch_->prepare(context_, team_);
    const Matrix& down = *block_.down;
    const DotJob job{
        down.all(context_.fetching), down.cols, full_batch_->tokens(), out, down.rows, nullptr, true};
    down_items_.drain(worker, [&](int64_t r0, int64_t r1) {
      dot_chunk(context_.kernels, down.format, job, r0, r1, tokens_, scratch);
    });
  }

  Context& context_;
  Pool& team_;
  const FfnBlock& block_;
  const int32_t* active_;
  const int64_t count_, tokens_;
  const bool compact_, skip_;
  Batch x_;
  float *first_, *h_;          // (tokens, count): the activated gate or up by position, and h by place
  uint8_t *opened_, *wanted_;  // by position, and by place
  int32_t *kept_positions_ = nullptr, *kept_ids_ = nullptr, *kept_rows_ = nullptr;
  const int32_t* active_rows_ = nullptr;
  int64_t kept_;
  std::optional<DownRecords> records_;
  float* full_ = nullptr;  // (tokens, neurons), for the standard layout
  std::optional<Batch> full_batch_;
  Areas<float> scratch_;
  Streams first_items_, second_items_, down_items_;
  Items token_items_;
  std::atomic<int64_t> fired_{0};
};

int64_t slice_tokens(int64_t neurons) {
  const int64_t per_token = 2 * std::max<int64_t>(neurons, 1) * static_cast<int64_t>(sizeof(float));
  return std::max(kSliceBytes / per_token, kFewestTokens);
}

}  // namespace

FfnWork ffn(Context& context, const float* x, int64_t tokens, const FfnBlock& block, const int32_t* active,
            int64_t n_active, bool skip, float* out, float* hidden) {
  skip = skip && block.records;
  const int64_t count = active ? n_active : block.neurons, columns = block.up->cols;
  Pool& team = context.team(count * block.up->row_bytes * tokens);
  uint8_t* opened = context.arena.take<uint8_t>(count);
  uint8_t* nonzero = context.arena.take<uint8_t>(count);
  std::fill(opened, opened + count, 0);
  std::fill(nonzero, nonzero + count, 0);
  FfnWork work{block.gate ? count : 0, count, count, 0};
  const int64_t step = slice_tokens(count);
  const Arena::Mark mark = context.arena.mark();
  for (int64_t t = 0; t < tokens; t += step) {
    context.arena.release(mark);
    Slice slice(context, team, block, x + t * columns, std::min(step, tokens - t), active, count, skip);
    slice.run(out + t * columns, hidden ? hidden + t * block.neurons : nullptr);
    slice.mark(opened, nonzero);
    work.fired += slice.fired();
  }
  if (skip) {
    if (block.gate) work.up_rows = std::count(opened, opened + count, 1);
    work.down_rows = std::count(nonzero, nonzero + count, 1);
  }
  return work;
}

}  // namespace thermocline
