// Every op at odd sizes, in all formats and on all levels of the CPU, for the sanitizers: inputs lie in
// memory that ends where they end, and all numbers of threads must give the same bits.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../arrange.h"
#include "../attention.h"
#include "../context.h"
#include "../dispatch.h"
#include "../ffn.h"
#include "../half.h"
#include "../linear.h"
#include "../predictor.h"
#include "../probes.h"
#include "../requantize.h"
#include "../vector_ops.h"

namespace thermocline {
namespace {

#ifdef __SANITIZE_THREAD__
constexpr int64_t kBlocks =
    1;  // every byte is watched, and who shares rows does not depend on how long they are
#else
constexpr int64_t kBlocks = 3;
#endif

using Floats = std::vector<float>;
using Bytes = std::vector<uint8_t>;

std::mt19937 random_source(7);

Floats floats(int64_t n) {
  std::normal_distribution<float> normal;
  Floats x(static_cast<size_t>(n));
  for (float& value : x) value = normal(random_source);
  return x;
}

// A matrix of any bytes, but for scales that are ordinary numbers.
struct Weights {
  Weights(Format format, int64_t rows, int64_t cols) {
    const FormatInfo& info = kFormatInfo[format];
    const int64_t row = row_bytes(format, cols);
    if (!is_integer(format)) {
      const Floats x = floats(rows * cols);
      for (float value : x) append(format, value);
    } else {
      for (int64_t i = 0; i < rows * row; ++i) bytes.push_back(static_cast<uint8_t>(random_source()));
      for (int64_t b = 0; b < rows * row; b += info.block_bytes) {
        uint8_t* block = bytes.data() + b;
        const int first = is_q6_k(format) ? 208 : format == kQ4_0x32 ? kLine * line_at(8) : 0;
        for (int i = 0; i < (has_scales_apart(format) ? info.block / kBlock : 1); ++i)
          store_u16(block + first + 2 * i, half_of_float(0.01f));
        if (has_minima(format)) store_u16(block + 2, half_of_float(0.01f));
      }
    }
    bytes.shrink_to_fit();
    matrix = {bytes.data(), format, rows, cols, row};
  }

  void append(Format format, float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t stored = format == kF32 ? bits : format == kBF16 ? bits >> 16 : half_of_float(value);
    for (int i = 0; i < kFormatInfo[format].block_bytes; ++i)
      bytes.push_back(static_cast<uint8_t>(stored >> 8 * i));
  }

  Bytes bytes;
  Matrix matrix{};
};

int failures = 0;

// op(context, out) by every number of threads, and each way to fetch rows, which must agree.
template <class Op>
void same(const char* what, const std::string& isa, int64_t size, Op op) {
  Floats first;
  for (int threads : {1, 2, 3, 7}) {
    Context context(threads, isa, false, threads % 2 ? "first" : "second");
    const OpScope scope(context);
    Floats out(static_cast<size_t>(size), 0.25f);
    op(context, out.data());
    if (threads == 1) {
      first = out;
    } else if (size && std::memcmp(first.data(), out.data(), first.size() * sizeof(float)) != 0) {
      std::printf("%s on %s differs with %d threads\n", what, isa.c_str(), threads);
      ++failures;
    }
  }
}

void products(const std::string& isa, Format format) {
  const int64_t block = kFormatInfo[format].block;
  std::vector<int64_t> widths{1, 15, 33, 100};
  if (block > 1) widths = {block};
  if (block > 1 && kBlocks > 1) widths.push_back(kBlocks * block);
  for (int64_t rows : {1, 5, 33}) {
    for (int64_t columns : widths) {
      const Weights w(format, rows, columns);
      for (int64_t tokens : {1, 3, 7, 8, 13, 29, 97}) {
        const Floats x = floats(tokens * columns), bias = floats(rows);
        same("linear", isa, tokens * rows, [&](Context& context, float* out) {
          const LinearPart part{w.matrix, out, bias.data()};
          linear(context, x.data(), tokens, columns, &part, 1, true);
        });
      }
    }
  }
}

void networks(const std::string& isa, Format format) {
  const int64_t block = kFormatInfo[format].block, width = block == 1 ? 37 : kBlocks * block, neurons = 301;
  const Weights gate(format, neurons, width), up(format, neurons, width), down(format, neurons, width);
  std::vector<int32_t> active;
  for (int32_t i = 0; i < neurons; i += 3) active.push_back(i);
  active.shrink_to_fit();
  FfnBlock ffn_block{};
  ffn_block.gate = &gate.matrix;
  ffn_block.up = &up.matrix;
  ffn_block.down = &down.matrix;
  ffn_block.records = true;
  ffn_block.activation = kRelu;
  ffn_block.neurons = neurons;
  for (int64_t tokens : {1, 2, 9, 21}) {
    const Floats x = floats(tokens * width);
    for (const bool skip : {false, true}) {
      for (const bool some : {false, true}) {
        same("ffn", isa, tokens * width, [&](Context& context, float* out) {
          Floats hidden(static_cast<size_t>(tokens * neurons));
          ffn(context, x.data(), tokens, ffn_block, some ? active.data() : nullptr,
              static_cast<int64_t>(active.size()), skip, out, hidden.data());
        });
      }
    }
    const int64_t rank = block == 1 ? 17 : block;
    const Weights fc1(format, rank, width), fc2(format, neurons, rank);
    same("predict", isa, tokens * neurons, [&](Context& context, float* out) {
      predict(context, x.data(), tokens, fc1.matrix, fc2.matrix, out);
    });
  }
  same("requantize", isa, 0, [&](Context& context, float*) {
    first_nonfinite_row(context, gate.matrix);
    Bytes out(static_cast<size_t>(width * row_bytes(kF16, neurons)));
    transpose_requantize(context, gate.matrix, kF16, out.data());
    if (!is_arranged(format)) return;
    const Weights whole(stored(format), neurons, block);
    Bytes blocks = whole.bytes;
    arrange(context, whole.matrix, format, blocks.data());
    Matrix same = whole.matrix;
    same.data = blocks.data();
    arrange(context, same, format, blocks.data());
  });
}

void attend(const std::string& isa, Format keys, Format values, int64_t dim) {
  const int64_t heads = 6, kv_heads = 2, room = 600;
  for (const auto& [start, tokens, window] : {std::tuple<int64_t, int64_t, int64_t>{0, 1, 0},
                                              {511, 2, 0},
                                              {300, 9, 40},
                                              {590, 10, 300},
                                              {500, 60, 0}}) {
    const Floats q = floats(tokens * heads * dim), k = floats(tokens * kv_heads * dim),
                 v = floats(tokens * kv_heads * dim);
    const Weights key_rows(keys, kv_heads * room, dim), value_rows(values, kv_heads * room, dim);
    same("attention", isa, tokens * heads * dim, [&](Context& context, float* out) {
      Bytes key_bytes = key_rows.bytes, value_bytes = value_rows.bytes;
      const auto cache = [&](Bytes& bytes, const Matrix& m) {
        return Cache{bytes.data(), m.format, room * m.row_bytes, m.row_bytes};
      };
      const AttentionJob job{q.data(),
                             k.data(),
                             v.data(),
                             tokens,
                             heads,
                             kv_heads,
                             dim,
                             cache(key_bytes, key_rows.matrix),
                             cache(value_bytes, value_rows.matrix),
                             start,
                             window,
                             0.2f,
                             out};
      attention(context, job);
    });
  }
}

// Two owners with more threads than cores, parked and woken.
void pools() {
  const Weights w(kF32, 300, 256);
  const Floats x = floats(256);
  const auto work = [&] {
    Context context(5, "baseline", true);
    Floats out(300);
    for (int i = 0; i < 60; ++i) {
      const OpScope scope(context);
      const LinearPart part{w.matrix, out.data(), nullptr};
      linear(context, x.data(), 1, 256, &part, 1, false);
      if (i % 8 == 0) context.pool.park();
      if (i % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  };
  std::thread other(work);
  work();
  other.join();
}

}  // namespace
}  // namespace thermocline

int main() {
  using namespace thermocline;
  for (const std::string& isa : isa_levels()) {
    for (int f = 0; f < kFormats; ++f) {
      products(isa, static_cast<Format>(f));
      networks(isa, static_cast<Format>(f));
    }
    for (const Format keys : {kF32, kF16, kQ8_0}) attend(isa, keys, keys == kQ8_0 ? kF16 : kQ8_0, 96);
    attend(isa, kF16, kF32, 33);
    std::printf("%s: done\n", isa.c_str());
  }
  pools();
  std::printf("pools: done\n");
  return failures != 0;
}
