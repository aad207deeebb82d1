#include "linear.h"

#include <algorithm>
#include <cstring>

namespace thermocline {
namespace {

constexpr int64_t kPiece = 2048;  // columns of a token quantised at a time

// Tokens from which widening a row once pays for writing and reading it back.
constexpr int64_t kWidenTokens = 8;
constexpr int64_t kWidenRows = 32;
// Blocks of tokens that fit the second cache (1 MB on common cores) beside the rows, at 4096 columns.
constexpr int64_t kFloatBlock = 24;
constexpr int64_t kIntBlock = 64;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

bool widens(Format format, int64_t tokens) {
  return tokens >= kWidenTokens && (format == kF16 || format == kBF16);
}

void dot_blocks(const Kernels& kernels, Format format, const DotJob& job, int64_t r0, int64_t r1,
                int64_t tokens) {
  const int64_t block = is_integer(format) ? kIntBlock : kFloatBlock;
  for (int64_t t = 0; t < tokens; t += block) {
    kernels.dot[format](job, r0, r1, t, std::min(t + block, tokens));
  }
}

}  // namespace

Batch::Batch(Context& context, const float* x, int64_t count, int64_t columns, bool quantised)
    : count_(count), columns_(columns) {
  tokens_.x = x;
  tokens_.x_stride = columns;
  if (!quantised) return;
  const int64_t stride = round_up(columns, 4 * kBlock);
  q_ = context.arena.take<int8_t>(count * stride);
  d_ = context.arena.take<float>(count * stride / kBlock);
  sums_ = context.arena.take<int16_t>(count * stride / 16);
  tokens_.q = q_;
  tokens_.d = d_;
  tokens_.sums = sums_;
  tokens_.q_stride = stride;
  pieces_ = (columns + kPiece - 1) / kPiece;
  items_.reset(count * pieces_, 1);
}

void Batch::quantise(Context& context, Pool& team) {
  if (!q_) return;
  items_.drain([&](int64_t item, int64_t) { quantise_piece(context.kernels, item); });
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
}

int64_t row_grain(int64_t rows, int64_t row_bytes, int64_t tokens, int workers) {
  constexpr int64_t kBytes = 64 * 1024, kBatchRows = 64;
  const int64_t wanted =
      tokens > 1 ? kBatchRows : std::clamp<int64_t>(kBytes / std::max<int64_t>(row_bytes, 1), 4, 64);
  const int64_t fair = rows / (4 * static_cast<int64_t>(workers)) + 1;
  return round_up(std::min(wanted, fair), 4);
}

int64_t dot_scratch(Format format, int64_t columns, int64_t tokens) {
  return widens(format, tokens) ? kWidenRows * columns : 0;
}

void dot_chunk(const Kernels& kernels, Format format, const DotJob& job, int64_t r0, int64_t r1,
               int64_t tokens, float* scratch) {
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
  bool quantised = false;
  int64_t bytes = 0, scratch = 0, pieces = 0;
  int64_t* first = context.arena.take<int64_t>(count + 1);
  int64_t* grain = context.arena.take<int64_t>(count);
  for (int64_t p = 0; p < count; ++p) {
    const Matrix& m = parts[p].matrix;
    quantised |= is_integer(m.format);
    bytes += m.rows * m.row_bytes * tokens;
    scratch = std::max(scratch, dot_scratch(m.format, columns, tokens));
    grain[p] = row_grain(m.rows, m.row_bytes, tokens, context.pool.size());
    first[p] = pieces;
    pieces += (m.rows + grain[p] - 1) / grain[p];
  }
  first[count] = pieces;
  if (tokens == 0) return;

  Pool& team = context.team(bytes);
  Batch batch(context, x, tokens, columns, quantised);
  float* wide = context.arena.take<float>(scratch * team.size());
  Items items;
  items.reset(pieces, 1);
  team.run([&](int worker) {
    batch.quantise(context, team);
    items.drain([&](int64_t item, int64_t) {
      const int64_t p = std::upper_bound(first, first + count + 1, item) - first - 1;
      const LinearPart& part = parts[p];
      const int64_t r0 = (item - first[p]) * grain[p], r1 = std::min(r0 + grain[p], part.matrix.rows);
      const DotJob job{part.matrix.all(), columns, batch.tokens(), part.out, part.matrix.rows,
                       part.bias,         add};
      dot_chunk(context.kernels, part.matrix.format, job, r0, r1, tokens, wide + worker * scratch);
    });
  });
}

}  // namespace thermocline
