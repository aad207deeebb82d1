// Matrices in the formats that only memory has.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// The format of files whose numbers a format of memory holds; others are their own.
Format stored(Format format);

// The matrix in a format of memory that holds its numbers, a multiple of whose blocks its columns are; `out`
// may be where the matrix lies.
void arrange(Context& context, const Matrix& source, Format format, uint8_t* out);

}  // namespace thermocline
