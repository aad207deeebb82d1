#include "probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace thermocline {

int64_t first_nonfinite_row(Context& context, const Matrix& matrix) {
  constexpr int64_t kPieceBytes = 256 * 1024;
  std::atomic<int64_t> first{matrix.rows};
  Items items;
  items.reset(matrix.rows, kPieceBytes / (matrix.row_bytes + 1) + 1);
  context.team(matrix.rows * matrix.row_bytes).run([&](int) {
    items.drain([&](int64_t begin, int64_t end) {
      if (begin >= first.load(std::memory_order_relaxed)) return;
      const int64_t bad = context.kernels.first_nonfinite[matrix.format](
          matrix.data + begin * matrix.row_bytes, end - begin, matrix.cols, matrix.row_bytes);
      if (bad < 0) return;
      int64_t known = first.load(std::memory_order_relaxed);
      while (begin + bad < known && !first.compare_exchange_weak(known, begin + bad)) {
      }
    });
  });
  return first.load() == matrix.rows ? -1 : first.load();
}

ReadProbe read_bandwidth(Context& context, const uint8_t* data, int64_t bytes) {
  constexpr int64_t kPieceBytes = 1024 * 1024;
  std::atomic<uint64_t> total{0};
  Items items;
  items.reset(bytes, kPieceBytes);
  const auto begin = std::chrono::steady_clock::now();
  context.pool.run([&](int) {
    uint64_t sum = 0;
    items.drain([&](int64_t from, int64_t to) { sum += context.kernels.checksum(data + from, to - from); });
    total.fetch_add(sum);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return {seconds.count() > 0 ? static_cast<double>(bytes) / seconds.count() : 0.0, total.load()};
}

ReadProbe read_rows(Context& context, const Matrix& matrix, const int32_t* ids, int64_t count) {
  constexpr int64_t kTogether = 8, kLine = 64;
  std::atomic<uint64_t> total{0};
  const auto row = [&](int64_t i) { return matrix.data + ids[i] * matrix.row_bytes; };
  const auto fetch_lines = [&](int64_t begin, int64_t end) {
    for (int64_t at = 0; at < matrix.row_bytes; at += kLine) {
      for (int64_t i = begin; i < end; ++i) __builtin_prefetch(row(i) + at);
    }
  };
  const auto fetch_row = [&](int64_t i) {
    for (int64_t at = 0; at < matrix.row_bytes; at += kLine) __builtin_prefetch(row(i) + at, 0, 2);
  };
  const bool whole = context.fetching == kToSecond;
  const auto begin = std::chrono::steady_clock::now();
  context.pool.run([&](int worker) {
    const int64_t first = count * worker / context.pool.size();
    const int64_t end = count * (worker + 1) / context.pool.size();
    uint64_t sum = 0;
    if (!whole) fetch_lines(first, std::min(first + kTogether, end));
    for (int64_t i = first; i < end; ++i) {
      const int64_t next = i + kTogether;
      if (whole && next < end) fetch_row(next);
      if (!whole && (i - first) % kTogether == 0) fetch_lines(next, std::min(next + kTogether, end));
      sum += context.kernels.checksum(row(i), matrix.row_bytes);
    }
    total.fetch_add(sum);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const double bytes = static_cast<double>(count * matrix.row_bytes);
  return {seconds.count() > 0 ? bytes / seconds.count() : 0.0, total.load()};
}

double tile_rate(Context& context, bool bytes) {
  constexpr int64_t kRounds = 20000;
  if (!context.kernels.turn_tiles) return 0.0;
  std::atomic<int64_t> operations{0};
  const auto begin = std::chrono::steady_clock::now();
  context.pool.run([&](int) { operations.fetch_add(context.kernels.turn_tiles(bytes, kRounds)); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(operations.load()) / seconds.count();
}

}  // namespace thermocline
