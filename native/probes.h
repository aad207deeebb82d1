// Passes over bytes: is a matrix sound, how fast is memory.
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

}  // namespace thermocline
