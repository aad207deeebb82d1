#include "arrange.h"

#include <cstring>

#include "pool.h"

namespace thermocline {
namespace {

constexpr int64_t kHalf = kBlock / 2;

// Blocks of Q4_0.
template <Format F>
void arrange_q4_0(const uint8_t* from, uint8_t* out) {
  constexpr int64_t kScale = 2, kStored = kFormatInfo[kQ4_0].block_bytes;
  static_assert(kStored == kScale + kHalf);
  for (int i = 0; i < kFormatInfo[F].block / kBlock; ++i) {
    const Part<F> part{out, i};
    std::memcpy(out + (scale_at(part) - part.block), from + kStored * i, kScale);
    std::memcpy(out + (numbers_at(part) - part.block), from + kStored * i + kScale, kHalf);
  }
}

using Parts = uint8_t[8][kBlock];

// The numbers of all parts of a K-quant.
template <Format F>
void unpack(const uint8_t* from, Parts& parts) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) unpack_part<F>({from, j}, parts[j]);
}

void put_nibbles(const Parts& parts, uint8_t* out) {
  for (int64_t j = 0; j < 8; ++j) {
    for (int64_t i = 0; i < kHalf; ++i)
      out[kHalf * j + i] = static_cast<uint8_t>((parts[j][i] & 15) | parts[j][kHalf + i] << 4);
  }
}

// What is above the nibbles: kBits of each number, of as many parts side by side as `kTurn`.
template <int kBits, int kTurn>
void put_high(const Parts& parts, uint8_t* out) {
  std::memset(out, 0, kHalf * kTurn);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < kHalf; ++i) {
      const int both = parts[j][i] >> 4 | parts[j][kHalf + i] >> 4 << kBits;
      out[kHalf * (j % kTurn) + i] |= static_cast<uint8_t>(both << 2 * kBits * (j / kTurn));
    }
  }
}

void arrange_q4_k(const uint8_t* from, uint8_t* out) {
  Parts parts;
  unpack<kQ4_K>(from, parts);
  std::memcpy(out, from, 16);
  put_nibbles(parts, out + 16);
}

void arrange_q5_k(const uint8_t* from, uint8_t* out) {
  Parts parts;
  unpack<kQ5_K>(from, parts);
  std::memcpy(out, from, 16);
  put_high<1, 2>(parts, out + 16);
  put_nibbles(parts, out + 48);
}

void arrange_q6_k(const uint8_t* from, uint8_t* out) {
  Parts parts;
  unpack<kQ6_K>(from, parts);
  put_nibbles(parts, out);
  put_high<2, 4>(parts, out + 128);
  std::memcpy(out + 192, from + 192, 18);
}

void arrange_block(Format format, const uint8_t* from, uint8_t* out) {
  if (format == kQ4_0x16) return arrange_q4_0<kQ4_0x16>(from, out);
  if (format == kQ4_0x32) return arrange_q4_0<kQ4_0x32>(from, out);
  if (format == kQ4_Kx8) return arrange_q4_k(from, out);
  if (format == kQ5_Kx8) return arrange_q5_k(from, out);
  arrange_q6_k(from, out);
}

}  // namespace

Format stored(Format format) {
  switch (format) {
    case kQ4_0x16:
    case kQ4_0x32:
      return kQ4_0;
    case kQ4_Kx8:
      return kQ4_K;
    case kQ5_Kx8:
      return kQ5_K;
    case kQ6_Kx8:
      return kQ6_K;
    default:
      return format;
  }
}

void arrange(Context& context, const Matrix& source, Format format, uint8_t* out) {
  const FormatInfo& info = kFormatInfo[format];
  const int64_t size = info.block_bytes;
  constexpr int64_t kGrain = 1024, kLargest = kFormatInfo[kQ4_0x32].block_bytes;
  Items items;
  items.reset(source.rows * (source.cols / info.block), kGrain);
  context.team(source.rows * source.row_bytes).run([&](int) {
    items.drain([&](int64_t begin, int64_t end) {
      uint8_t block[kLargest];
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(block, source.data + i * size, static_cast<size_t>(size));
        arrange_block(format, block, out + i * size);
      }
    });
  });
}

}  // namespace thermocline
