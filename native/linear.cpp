#include "linear.h"

#include <algorithm>
#include <cstring>

namespace thermocline {
namespace {

constexpr int64_t kPiece = 2048;  // columns of a token quantised at a time

// Tokens from which widening a row once pays for writing and reading it back, where there are no panels.
constexpr int64_t kWidenTokens = 96;
constexpr int64_t kWidenRows = 32;
// Blocks of tokens that fit the second cache (1 MB on common cores) beside the rows, at 4096 columns.
constexpr int64_t kFloatBlock = 24;
constexpr int64_t kIntBlock = 64;
// Bytes of panels that are multiplied in one go: half of the second cache of CPUs with AMX.
constexpr int64_t kPanelsBytes = 1 << 20;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

bool widens(Format format, int64_t tokens) {
  return tokens >= kWidenTokens && (format == kF16 || format == kBF16);
}

// Rows whose panels are made in one go.
int64_t panel_rows(const PanelKernels& panel, int64_t columns) {
  const int64_t fit = kPanelsBytes / std::max<int64_t>(panel.bytes(columns), 1) * kPanelRows;
  return std::clamp(fit, kPanelRows, panel.rows);
}

void dot_blocks(const Kernels& kernels, Format format, const DotJob& job, int64_t r0, int64_t r1,
                int64_t tokens) {
  const int64_t block = is_integer(format) ? kIntBlock : kFloatBlock;
  for (int64_t t = 0; t < tokens; t += block) {
    kernels.dot[format](job, r0, r1, t, std::min(t + block, tokens));
  }
}

}  // namespace

bool has_panel(const Kernels& kernels, Format format, int64_t tokens) {
  return kernels.panel[format].dot && tokens >= kernels.panel[format].least;
}

Batch::Batch(Context& context, const float* x, int64_t count, int64_t columns, unsigned forms)
    : count_(count), columns_(columns) {
  Arena& arena = context.arena;
  tokens_.x = x;
  tokens_.x_stride = columns;
  if (forms & (kBytes | kOffsetBytes)) {
    const int64_t stride = round_up(columns, kQuadColumns);
    tokens_.q = q_ = arena.take<int8_t>(count * stride);
    tokens_.d = d_ = arena.take<float>(count * stride / kBlock);
    tokens_.sums = sums_ = arena.take<int16_t>(count * stride / 16);
    tokens_.q_stride = stride;
    if (forms & kOffsetBytes) {
      tokens_.offset = offset_ = arena.take<uint8_t>(count * stride);
      tokens_.lifts = lifts_ = arena.take<float>(count * stride / kBlock);
    }
    if (forms & kQuads) tokens_.quads = quads_ = arena.take<QuadToken>(count * stride / kQuadColumns);
    pieces_ = (columns + kPiece - 1) / kPiece;
    byte_items_.reset(count * pieces_, 1);
  }
  if (forms & kTiled) {
    tokens_.tiles = tiles_ = arena.take<float>(round_up(count, kTileTokens) * columns);
    tile_items_.reset((count + kTileTokens - 1) / kTileTokens, 1);
  }
  if (forms & kRounded) {
    tokens_.rounded = rounded_ = arena.take<uint16_t>(count * round_up(columns, 2));
    round_items_.reset(count, 1);
  }
  if (forms & (kPaired | kSplit)) {
    const int64_t groups = parts_of(count, kGroupTokens);
    group_size_ = kGroupTokens * round_up(columns, kPairColumns);
    if (forms & kPaired) tokens_.pairs = pairs_ = arena.take<uint16_t>(groups * group_size_);
    if (forms & kSplit) tokens_.split = split_ = arena.take<uint16_t>(groups * 2 * group_size_);
    group_items_.reset(groups, 1);
  }
}

void Batch::prepare(Context& context, Pool& team) {
  if (!q_ && !tiles_ && !rounded_ && !pairs_ && !split_) return;
  const Kernels& kernels = context.kernels;
  byte_items_.drain([&](int64_t item, int64_t) { quantise_piece(kernels, item); });
  tile_items_.drain([&](int64_t item, int64_t) {
    const int64_t t = item * kTileTokens;
    kernels.tile_tokens(tokens_.x + t * columns_, columns_, std::min<int64_t>(count_ - t, kTileTokens),
                        columns_, tiles_ + t * columns_);
  });
  round_items_.drain([&](int64_t t, int64_t) {
    kernels.round_tokens(tokens_.x + t * columns_, columns_, rounded_ + t * round_up(columns_, 2));
  });
  group_items_.drain([&](int64_t group, int64_t) {
    const int64_t t = group * kGroupTokens, count = std::min<int64_t>(count_ - t, kGroupTokens);
    const float* x = tokens_.x + t * columns_;
    if (pairs_) kernels.pair_tokens(x, columns_, count, columns_, pairs_ + group * group_size_);
    if (split_) kernels.split_tokens(x, columns_, count, columns_, split_ + group * 2 * group_size_);
  });
  team.barrier();
}

void Batch::quantise_piece(const Kernels& kernels, int64_t piece) {
  const int64_t token = piece / pieces_, begin = piece % pieces_ * kPiece;
  const int64_t end = std::min(begin + kPiece, columns_), stride = tokens_.q_stride;
  int8_t* q = q_ + token * stride;
  float* d = d_ + token * stride / kBlock;
  int16_t* sums = sums_ + token * stride / 16;
  kernels.quantize(tokens_.x + token * columns_ + begin, end - begin, q + begin, d + begin / kBlock,
                   sums + begin / 16);
  if (end == columns_ && stride > columns_) {
    const int64_t rest = stride - columns_;
    std::memset(q + columns_, 0, static_cast<size_t>(rest));
    std::fill(sums + columns_ / 16, sums + stride / 16, int16_t{0});
    std::fill(d + columns_ / kBlock, d + stride / kBlock, 0.0f);
  }
  if (quads_)
    kernels.quad_tokens(q + begin, d + begin / kBlock, sums + begin / 16, parts_of(end - begin, kQuadColumns),
                        quads_ + (token * stride + begin) / kQuadColumns);
  if (!offset_) return;
  uint8_t* offset = offset_ + token * stride;
  for (int64_t c = begin; c < end; ++c) offset[c] = static_cast<uint8_t>(q[c] ^ 0x80);
  float* lifts = lifts_ + token * stride / kBlock;
  for (int64_t b = begin / kBlock; b < end / kBlock; ++b)
    lifts[b] = d[b] * static_cast<float>(sums[2 * b] + sums[2 * b + 1]);
}

int64_t row_grain(int64_t rows, int64_t row_bytes, int64_t tokens, int workers) {
  constexpr int64_t kBytes = 16 * 1024, kBatchRows = 256;
  const int64_t wanted =
      tokens > 1 ? kBatchRows : std::clamp<int64_t>(kBytes / std::max<int64_t>(row_bytes, 1), 4, 64);
  const int64_t fair = rows / (4 * static_cast<int64_t>(workers)) + 1;
  return round_up(std::min(wanted, fair), 4);
}

unsigned form_of(const Kernels& kernels, Format format, int64_t tokens) {
  if (has_panel(kernels, format, tokens)) return kernels.panel[format].form;
  if (!is_integer(format)) return kPlain;
  return kernels.quad_tokens ? kBytes | kQuads : kBytes;
}

int64_t dot_scratch(const Kernels& kernels, Format format, int64_t columns, int64_t tokens) {
  if (has_panel(kernels, format, tokens)) {
    const PanelKernels& panel = kernels.panel[format];
    const int64_t panels = round_up(panel_rows(panel, columns) / kPanelRows * panel.bytes(columns), 64);
    return (panels + round_up(panel.scratch, 64)) / 4;
  }
  return widens(format, tokens) ? kWidenRows * columns : 0;
}

void dot_chunk(const Kernels& kernels, Format format, const DotJob& job, int64_t r0, int64_t r1,
               int64_t tokens, float* scratch) {
  if (has_panel(kernels, format, tokens)) {
    const PanelKernels& panel = kernels.panel[format];
    auto* panels = reinterpret_cast<uint8_t*>(scratch);
    const int64_t rows = panel_rows(panel, job.columns), size = panel.bytes(job.columns);
    uint8_t* behind = panels + round_up(rows / kPanelRows * size, 64);
    for (int64_t r = r0; r < r1; r += rows) {
      const int64_t end = std::min(r + rows, r1);
      for (int64_t p = r; p < end; p += kPanelRows)
        panel.pack(job.rows, p, std::min(p + kPanelRows, end), job.columns,
                   panels + (p - r) / kPanelRows * size);
      panel.dot(job, panels, r, end, tokens, behind);
    }
    return;
  }
  if (!widens(format, tokens)) return dot_blocks(kernels, format, job, r0, r1, tokens);
  for (int64_t r = r0; r < r1; r += kWidenRows) {
    const int64_t end = std::min(r + kWidenRows, r1);
    kernels.dequantize[format](job.rows, r, end, 0, job.columns, scratch, job.columns);
    DotJob wide = job;
    wide.rows = {reinterpret_cast<const uint8_t*>(scratch), job.columns * 4, nullptr};
    wide.out += r;
    if (wide.bias) wide.bias += r;
    dot_blocks(kernels, kF32, wide, 0, end - r, tokens);
  }
}

void linear(Context& context, const float* x, int64_t tokens, int64_t columns, const LinearPart* parts,
            int64_t count, bool add) {
  const Kernels& kernels = context.kernels;
  unsigned forms = kPlain;
  int64_t bytes = 0, scratch = 0, pieces = 0;
  int64_t* first = context.arena.take<int64_t>(count + 1);
  int64_t* grain = context.arena.take<int64_t>(count);
  for (int64_t p = 0; p < count; ++p) {
    const Matrix& m = parts[p].matrix;
    forms |= form_of(kernels, m.format, tokens);
    bytes += m.rows * m.row_bytes * tokens;
    scratch = std::max(scratch, dot_scratch(kernels, m.format, columns, tokens));
    grain[p] = row_grain(m.rows, m.row_bytes, tokens, context.pool.size());
    first[p] = pieces;
    pieces += (m.rows + grain[p] - 1) / grain[p];
  }
  first[count] = pieces;
  if (tokens == 0) return;

  Pool& team = context.team(bytes);
  Batch batch(context, x, tokens, columns, forms);
  const Areas<float> wide = context.arena.take_areas<float>(scratch, team.size());
  Streams streams = context.streams(team);
  streams.reset(pieces, 1, tokens == 1);
  const auto part_of = [&](int64_t piece) {
    return std::upper_bound(first, first + count, piece) - first - 1;
  };
  team.run([&](int worker) {
    const int64_t own = streams.begin(worker);
    if (own < pieces) {
      const int64_t p = part_of(own);
      fetch(parts[p].matrix.data + (own - first[p]) * grain[p] * parts[p].matrix.row_bytes);
    }
    batch.prepare(context, team);
    streams.drain(worker, [&](int64_t piece, int64_t end) {
      while (piece < end) {
        const int64_t p = part_of(piece), last = std::min(end, first[p + 1]);
        const LinearPart& part = parts[p];
        const int64_t r0 = (piece - first[p]) * grain[p];
        const int64_t r1 = std::min((last - first[p]) * grain[p], part.matrix.rows);
        const DotJob job{part.matrix.all(context.fetching),
                         columns,
                         batch.tokens(),
                         part.out,
                         part.matrix.rows,
                         part.bias,
                         add};
        dot_chunk(kernels, part.matrix.format, job, r0, r1, tokens, wide.of(worker));
        piece = last;
      }
    });
  });
}

}  // namespace thermocline
