// Matrices as a copy in memory has them.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// Blocks of Q4_0, a multiple of kTogether, as kQ4_0x16 has them; `out` may be where they lie.
void arrange(Context& context, const uint8_t* blocks, int64_t count, uint8_t* out);

}  // namespace thermocline
