// From the standard layout of ffn_down to neuron records.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// What storing in the new format changed, over all elements; the largest is infinite if anything is not
// finite or does not fit the format. `source` is the root mean square of the elements themselves.
struct RequantizeError {
  double max_abs, rms, source;
};

// out: source.cols rows of source.rows elements in `format`, the transpose of `source`. Rounds as ggml's
// reference quantisers do.
RequantizeError transpose_requantize(Context& context, const Matrix& source, Format format, uint8_t* out);

// n numbers, a multiple of kBlock, as Q8_0, rounded as ggml's reference quantiser does.
void encode_q8_0(const float* x, int64_t n, uint8_t* out);

}  // namespace thermocline
