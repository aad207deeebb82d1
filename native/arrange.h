// Matrices in the formats that only memory has.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// The format of memory that holds the numbers of `format`; itself if there is none.
Format arranged(Format format);

// The matrix in that format, a multiple of whose blocks its columns are; `out` may be where the matrix lies.
void arrange(Context& context, const Matrix& source, uint8_t* out);

}  // namespace thermocline
