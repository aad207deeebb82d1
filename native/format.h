// Block formats of ggml, as the kernels index them.
//
// The ISA files are compiled with different flags, so every header that they share holds plain data and
// functions of internal linkage only: an inline function with external linkage could be merged by the linker
// into a copy that uses instructions the running CPU lacks.
#pragma once

#include <cstdint>

namespace thermocline {

// clang-format off
enum Format : int {
  kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_0x16, kQ4_0x32, kQ4_K, kQ4_Kx8, kQ5_K, kQ5_Kx8, kQ6_K, kQ6_Kx8,
  kFormats
};
// clang-format on

struct FormatInfo {
  int ggml_type;    // negative for what no file has
  int block;        // elements of a block
  int block_bytes;  // stored bytes of a block
  const char* name;
};

constexpr FormatInfo kFormatInfo[kFormats] = {
    {0, 1, 4, "F32"},         {1, 1, 2, "F16"},          {30, 1, 2, "BF16"},         {8, 32, 34, "Q8_0"},
    {2, 32, 18, "Q4_0"},      {-1, 512, 288, "Q4_0x16"}, {-5, 1024, 576, "Q4_0x32"}, {12, 256, 144, "Q4_K"},
    {-2, 256, 144, "Q4_Kx8"}, {13, 256, 176, "Q5_K"},    {-4, 256, 176, "Q5_Kx8"},   {14, 256, 210, "Q6_K"},
    {-3, 256, 210, "Q6_Kx8"},
};

// What only memory has, laid out so that numbers and scales fill vectors as they lie; the same numbers give
// the same bits. kQ4_0x16 has the scales of 16 blocks of Q4_0 first, then their numbers. kQ4_0x32 is for rows
// that are read one here, one there: whole lines of the cache, one of scales and eight of numbers, which lie
// in such an order that whoever reads the numbers in theirs jumps. Else a processor takes the lines for the
// beginning of a stream, and fetches after every short row what nobody reads. In the others each part of a
// superblock has its nibbles in bytes of its own, as a block of Q4_0 has them. What is above the nibbles of
// numbers i and 16 + i of part j are bits 2 (j / 2) and 2 (j / 2) + 1 of byte 16 (j % 2) + i in kQ5_Kx8, and
// two bits each from bit 4 (j / 4) on of byte 16 (j % 4) + i in kQ6_Kx8.

// Elements that share a scale in Q8_0, Q4_0 and in quantised activations. The blocks of K-quants hold eight
// parts of as many, which the kernels count as blocks.
constexpr int kBlock = 32;

// Formats that only memory has.
static constexpr bool is_arranged(Format format) { return kFormatInfo[format].ggml_type < 0; }
// Formats whose dot products are taken in integers.
static constexpr bool is_integer(Format format) { return format >= kQ8_0; }
static constexpr bool is_k_quant(Format format) { return format >= kQ4_K; }
static constexpr bool has_scales_apart(Format format) { return format == kQ4_0x16 || format == kQ4_0x32; }
static constexpr bool is_q4_0(Format format) { return format == kQ4_0 || has_scales_apart(format); }
static constexpr bool is_q4_k(Format format) { return format == kQ4_K || format == kQ4_Kx8; }
static constexpr bool is_q5_k(Format format) { return format == kQ5_K || format == kQ5_Kx8; }
static constexpr bool is_q6_k(Format format) { return format == kQ6_K || format == kQ6_Kx8; }
// Formats whose parts have 16 bytes each: their first 16 numbers in the low halves, the others in the high
// ones.
static constexpr bool is_in_halves(Format format) { return is_q4_0(format) || format == kQ4_Kx8; }
// Formats whose numbers are lifted by a minimum for each 32: x = scale * q - minimum.
static constexpr bool has_minima(Format format) { return is_q4_k(format) || is_q5_k(format); }
// What is stored is the number plus this.
static constexpr int offset_of(Format format) { return is_q4_0(format) ? 8 : is_q6_k(format) ? 32 : 0; }

// The 32 elements with index b of a row: where their block begins, and their part of it.
template <Format F>
struct Part {
  const uint8_t* block;
  int part;
};

template <Format F>
static inline Part<F> part_at(const uint8_t* row, int64_t b) {
  constexpr int kParts = kFormatInfo[F].block / kBlock;
  return {row + b / kParts * kFormatInfo[F].block_bytes, static_cast<int>(b % kParts)};
}

constexpr int kLine = 64;  // bytes of a cache line

// Which line of a block of kQ4_0x32 has the numbers of parts 4 i to 4 i + 3; for i = 8, all scales.
static constexpr int line_at(int i) { return static_cast<int>(int64_t{0x762531804} >> 4 * i & 15); }

// Where the scale of a part's block lies.
template <Format F>
static inline const uint8_t* scale_at(const Part<F>& at) {
  if constexpr (F == kQ4_0x32) return at.block + line_at(8) * kLine + 2 * at.part;
  return at.block + (F == kQ4_0x16 ? 2 * at.part : is_q6_k(F) ? 208 : 0);
}

// Where the numbers of a part begin that has bytes of its own.
template <Format F>
static inline const uint8_t* numbers_at(const Part<F>& at) {
  if constexpr (F == kQ4_0x32) return at.block + line_at(at.part / 4) * kLine + at.part % 4 * (kBlock / 2);
  constexpr int kFirst = F == kQ4_0x16 ? 32 : F == kQ4_Kx8 ? 16 : 2;
  return at.block + kFirst + (kFirst > 2 ? kBlock / 2 * at.part : 0);
}

// The 6-bit scale and minimum of part j, which Q4_K and Q5_K pack into 12 bytes.
struct ScaleMin {
  int scale, least;
};

static inline ScaleMin scale_min(const uint8_t* packed, int j) {
  if (j < 4) return {packed[j] & 63, packed[j + 4] & 63};
  return {(packed[j + 4] & 15) | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4};
}

// The 32 numbers of a part of a K-quant as they are stored, without sign: plain code for levels without their
// own.
template <Format F>
static inline void unpack_part(const Part<F>& at, uint8_t* q) {
  if constexpr (F == kQ5_Kx8 || F == kQ6_Kx8) {
    constexpr int kBits = F == kQ5_Kx8 ? 1 : 2, kLow = F == kQ5_Kx8 ? 48 : 0, kHigh = F == kQ5_Kx8 ? 16 : 128;
    constexpr int kMask = (1 << kBits) - 1, kTurn = F == kQ5_Kx8 ? 2 : 4;
    const uint8_t *low = at.block + kLow + 16 * at.part, *high = at.block + kHigh + 16 * (at.part % kTurn);
    const int shift = 2 * kBits * (at.part / kTurn);
    for (int i = 0; i < 16; ++i) {
      q[i] = static_cast<uint8_t>((low[i] & 15) | (high[i] >> shift & kMask) << 4);
      q[16 + i] = static_cast<uint8_t>(low[i] >> 4 | (high[i] >> (shift + kBits) & kMask) << 4);
    }
    return;
  }
  const uint8_t* low = at.block + (F == kQ4_K ? 16 : F == kQ5_K ? 48 : at.part / 4 * 64);
  if constexpr (F == kQ6_K) {
    const uint8_t* high = at.block + 128 + at.part / 4 * 32;
    const int j = at.part % 4;
    low += j % 2 * 32;
    for (int i = 0; i < kBlock; ++i)
      q[i] = static_cast<uint8_t>((low[i] >> j / 2 * 4 & 15) | (high[i] >> 2 * j & 3) << 4);
  } else {
    low += at.part / 2 * 32;
    for (int i = 0; i < kBlock; ++i) q[i] = low[i] >> at.part % 2 * 4 & 15;
    if constexpr (F == kQ5_K) {
      for (int i = 0; i < kBlock; ++i) q[i] |= static_cast<uint8_t>((at.block[16 + i] >> at.part & 1) << 4);
    }
  }
}

}  // namespace thermocline
