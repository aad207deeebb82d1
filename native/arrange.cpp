#include "arrange.h"

#include <cstring>

#include "pool.h"

namespace thermocline {
namespace {

constexpr int64_t kStored = kFormatInfo[kQ4_0].block_bytes, kScale = 2, kNumbers = kStored - kScale;
static_assert(kTogether * kStored == kFormatInfo[kQ4_0x16].block_bytes);

void arrange_some(const uint8_t* blocks, uint8_t* out) {
  uint8_t held[kTogether * kStored];
  std::memcpy(held, blocks, sizeof held);
  for (int64_t i = 0; i < kTogether; ++i) {
    std::memcpy(out + kScale * i, held + kStored * i, kScale);
    std::memcpy(out + kScale * kTogether + kNumbers * i, held + kStored * i + kScale, kNumbers);
  }
}

}  // namespace

void arrange(Context& context, const uint8_t* blocks, int64_t count, uint8_t* out) {
  constexpr int64_t kGrain = 1024, kSize = kTogether * kStored;
  Items items;
  items.reset(count / kTogether, kGrain);
  context.team(count * kStored).run([&](int) {
    items.drain([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) arrange_some(blocks + i * kSize, out + i * kSize);
    });
  });
}

}  // namespace thermocline
