// Passes over bytes: is a matrix sound, how fast is memory; and how fast are tiles.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// The first row that holds a NaN or an infinity in a value or a block scale, or -1.
int64_t first_nonfinite_row(Context& context, const Matrix& matrix);

struct ReadProbe {
  double bytes_per_second;
  uint64_t checksum;
};

// Reads `bytes` once with all workers.
ReadProbe read_bandwidth(Context& context, const uint8_t* data, int64_t bytes);

// Reads `count` rows of a matrix, in ascending order, once with all workers, as fast as it can: the next few
// are fetched by turns while these are read.
ReadProbe read_rows(Context& context, const Matrix& matrix, const int32_t* ids, int64_t count);

// Operations a second that all workers reach with tiles of bytes, or of BF16 numbers, alone; 0 without tiles.
double tile_rate(Context& context, bool bytes);

}  // namespace thermocline
