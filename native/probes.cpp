#include "probes.h"

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
