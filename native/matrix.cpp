#include "matrix.h"

#include <stdexcept>
#include <string>

namespace thermocline {

Format format_of(int ggml_type) {
  for (int f = 0; f < kFormats; ++f) {
    if (kFormatInfo[f].ggml_type == ggml_type) return static_cast<Format>(f);
  }
  throw std::invalid_argument("ggml_type " + std::to_string(ggml_type) + " has no kernels");
}

int64_t row_bytes(Format format, int64_t cols) {
  const FormatInfo& info = kFormatInfo[format];
  if (cols < 0 || cols % info.block != 0) {
    throw std::invalid_argument("columns " + std::to_string(cols) + " are not whole blocks of " +
                                std::to_string(info.block) + " (" + info.name + ")");
  }
  return cols / info.block * info.block_bytes;
}

}  // namespace thermocline
