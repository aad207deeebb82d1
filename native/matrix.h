// A checked matrix in a block format.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace thermocline {

struct Matrix {
  const uint8_t* data;
  Format format;
  int64_t rows, cols, row_bytes;

  Rows all(Fetching fetching = kToFirst) const { return {data, row_bytes, nullptr, rows, fetching}; }
  // Some rows, or all if `ids` is null.
  Rows at(const int32_t* ids, int64_t count, Fetching fetching = kToFirst) const {
    return {data, row_bytes, ids, count, fetching};
  }
};

// Pieces of `size` that n takes.
inline int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The format with that ggml number. Throws std::invalid_argument if there is none.
Format format_of(int ggml_type);

// Bytes of a row. Throws std::invalid_argument if `cols` is not a whole number of blocks.
int64_t row_bytes(Format format, int64_t cols);

}  // namespace thermocline
