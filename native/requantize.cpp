#include "requantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"

namespace thermocline {
namespace {

constexpr int64_t kColumns = 64;  // of the source, turned into rows at a time
constexpr int64_t kRows = 16;     // of the source, read at a time

uint16_t bfloat_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 64);
  return static_cast<uint16_t>((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16);
}

// The sum in double is exact, so that cutting it off rounds half away from zero.
int round_away(float x) { return static_cast<int>(static_cast<double>(x) + (x < 0 ? -0.5 : 0.5)); }

// 0 where there is none: a block of zeros, or of numbers too small to have one.
float inverse_of(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

void encode_q8_0_block(const float* x, uint8_t* out) {
  float peak = 0.0f;
  for (int i = 0; i < kBlock; ++i) peak = std::max(peak, std::fabs(x[i]));
  const float scale = peak / 127.0f, inverse = inverse_of(scale);
  store_u16(out, half_of_float(scale));
  for (int i = 0; i < kBlock; ++i)
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(round_away(x[i] * inverse)));
}

// The value of largest magnitude becomes exactly -8 steps.
void encode_q4_0(const float* x, uint8_t* out) {
  float extreme = x[0];
  for (int i = 1; i < kBlock; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  const float scale = extreme / -8.0f;
  const float inverse = inverse_of(scale);
  const auto step = [&](float value) { return std::clamp(static_cast<int>(value * inverse + 8.5f), 0, 15); };
  store_u16(out, half_of_float(scale));
  for (int i = 0; i < 16; ++i) out[2 + i] = static_cast<uint8_t>(step(x[i]) | step(x[16 + i]) << 4);
}

void encode(const Kernels& kernels, Format format, const float* x, int64_t n, uint8_t* out) {
  switch (format) {
    case kF32:
      std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
      return;
    case kF16:
      kernels.to_half(x, out, n);
      return;
    case kBF16:
      for (int64_t i = 0; i < n; ++i) store_u16(out + 2 * i, bfloat_of_float(x[i]));
      return;
    case kQ8_0:
      encode_q8_0(x, n, out);
      return;
    default:
      break;
  }
  for (int64_t b = 0; b < n / kBlock; ++b)
    encode_q4_0(x + b * kBlock, out + b * kFormatInfo[format].block_bytes);
}

struct Deviation {
  double max_abs, squares, source;
};

// Columns c0 .. c1 of the source as rows of floats, `stride` apart.
void transpose(const Kernels& kernels, const Matrix& source, int64_t c0, int64_t c1, float* rows,
               int64_t stride) {
  float tile[kRows * kColumns];
  for (int64_t r0 = 0; r0 < source.rows; r0 += kRows) {
    const int64_t n = std::min(kRows, source.rows - r0);
    kernels.dequantize[source.format](source.all(), r0, r0 + n, c0, c1, tile, kColumns);
    for (int64_t c = 0; c < c1 - c0; ++c) {
      for (int64_t r = 0; r < n; ++r) rows[c * stride + r0 + r] = tile[r * kColumns + c];
    }
  }
}

}  // namespace

void encode_q8_0(const float* x, int64_t n, uint8_t* out) {
  for (int64_t b = 0; b < n / kBlock; ++b)
    encode_q8_0_block(x + b * kBlock, out + b * kFormatInfo[kQ8_0].block_bytes);
}

RequantizeError transpose_requantize(Context& context, const Matrix& source, Format format, uint8_t* out) {
  const Kernels& kernels = context.kernels;
  const int64_t n = source.rows, out_bytes = row_bytes(format, n);
  const int64_t pieces = (source.cols + kColumns - 1) / kColumns;
  // Not a power of two, or the rows of a tile would fall on the same cache sets.
  const int64_t stride = n + kRows;
  Pool& team = context.team(source.rows * source.row_bytes);
  const Areas<float> buffers = context.arena.take_areas<float>(kColumns * stride + n, team.size());
  Deviation* deviations = context.arena.take<Deviation>(pieces);
  Items items;
  items.reset(pieces, 1);
  team.run([&](int worker) {
    float* rows = buffers.of(worker);
    float* back = rows + kColumns * stride;
    items.drain([&](int64_t item, int64_t) {
      const int64_t c0 = item * kColumns, c1 = std::min(c0 + kColumns, source.cols);
      transpose(kernels, source, c0, c1, rows, stride);
      Deviation deviation{0.0, 0.0, 0.0};
      for (int64_t c = c0; c < c1; ++c) {
        const float* row = rows + (c - c0) * stride;
        uint8_t* to = out + c * out_bytes;
        encode(kernels, format, row, n, to);
        kernels.dequantize[format]({to, out_bytes, nullptr}, 0, 1, 0, n, back, n);
        for (int64_t i = 0; i < n; ++i) {
          const double element = static_cast<double>(row[i]);
          const double error = std::fabs(static_cast<double>(back[i]) - element);
          deviation.max_abs = std::max(deviation.max_abs, error);
          deviation.squares += error * error;
          deviation.source += element * element;
        }
      }
      deviations[item] = deviation;
    });
  });
  RequantizeError total{0.0, 0.0, 0.0};
  for (int64_t p = 0; p < pieces; ++p) {
    total.max_abs = std::max(total.max_abs, deviations[p].max_abs);
    total.rms += deviations[p].squares;
    total.source += deviations[p].source;
  }
  const double elements = static_cast<double>(source.rows) * static_cast<double>(source.cols);
  total.rms = elements > 0 ? std::sqrt(total.rms / elements) : 0.0;
  total.source = elements > 0 ? std::sqrt(total.source / elements) : 0.0;
  if (!std::isfinite(total.rms)) total.max_abs = std::numeric_limits<double>::infinity();
  return total;
}

}  // namespace thermocline
