#include "arrange.h"

#include <cstring>

#include "pool.h"

namespace thermocline {
namespace {

constexpr int64_t kHalf = kBlock / 2;

// The scales of the blocks, then their numbers.
void arrange_q4_0(const uint8_t* from, uint8_t* out) {
  constexpr int64_t kScale = 2, kStored = kScale + kHalf;
  static_assert(kStored == kFormatInfo[kQ4_0].block_bytes);
  for (int64_t i = 0; i < kTogether; ++i) {
    std::memcpy(out + kScale * i, from + kStored * i, kScale);
    std::memcpy(out + kScale * kTogether + kHalf * i, from + kStored * i + kScale, kHalf);
  }
}

// Two parts share 32 bytes, whose low halves are the numbers of the first: so that each gets 16 of its own.
void arrange_q4_k(const uint8_t* from, uint8_t* out) {
  constexpr int64_t kHead = 16;
  std::memcpy(out, from, kHead);
  for (int64_t pair = 0; pair < 4; ++pair) {
    const uint8_t* both = from + kHead + 2 * kHalf * pair;
    uint8_t* to = out + kHead + 2 * kHalf * pair;
    for (int64_t i = 0; i < kHalf; ++i) {
      to[i] = static_cast<uint8_t>((both[i] & 15) | both[kHalf + i] << 4);
      to[kHalf + i] = static_cast<uint8_t>(both[i] >> 4 | (both[kHalf + i] & 0xF0));
    }
  }
}

}  // namespace

Format arranged(Format format) { return format == kQ4_0 ? kQ4_0x16 : format == kQ4_K ? kQ4_Kx8 : format; }

void arrange(Context& context, const Matrix& source, uint8_t* out) {
  const Format format = arranged(source.format);
  if (format == source.format) return;
  const FormatInfo& info = kFormatInfo[format];
  const int64_t size = info.block_bytes;
  constexpr int64_t kGrain = 1024, kLargest = kFormatInfo[kQ4_0x16].block_bytes;
  Items items;
  items.reset(source.rows * (source.cols / info.block), kGrain);
  context.team(source.rows * source.row_bytes).run([&](int) {
    items.drain([&](int64_t begin, int64_t end) {
      uint8_t block[kLargest];
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(block, source.data + i * size, static_cast<size_t>(size));
        (format == kQ4_0x16 ? arrange_q4_0 : arrange_q4_k)(block, out + i * size);
      }
    });
  });
}

}  // namespace thermocline
