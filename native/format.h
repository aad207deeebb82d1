// Block formats of ggml, as the kernels index them.
//
// The ISA files are compiled with different flags, so every header that they share holds plain data and
// functions of internal linkage only: an inline function with external linkage could be merged by the linker
// into a copy that uses instructions the running CPU lacks.
#pragma once

#include <cstdint>

namespace thermocline {

enum Format : int { kF32 = 0, kF16 = 1, kBF16 = 2, kQ8_0 = 3, kQ4_0 = 4, kFormats = 5 };

struct FormatInfo {
  int ggml_type;
  int block;        // elements of a block
  int block_bytes;  // stored bytes of a block
  const char* name;
};

constexpr FormatInfo kFormatInfo[kFormats] = {
    {0, 1, 4, "F32"}, {1, 1, 2, "F16"}, {30, 1, 2, "BF16"}, {8, 32, 34, "Q8_0"}, {2, 32, 18, "Q4_0"},
};

// Elements that share a scale in Q8_0, Q4_0 and in quantised activations.
constexpr int kBlock = 32;

static constexpr bool is_integer(Format format) { return format == kQ8_0 || format == kQ4_0; }

}  // namespace thermocline
