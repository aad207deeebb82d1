// Ops over single vectors of a batch: embedding rows, norms, rotary positions.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// out (tokens, columns) = rows ids[t] of the table
void embed(Context& context, const Matrix& table, const int32_t* ids, int64_t tokens, float* out);

// out = x / sqrt(mean(x^2) + eps) * weight over each of `rows` vectors of `columns`; `out` may be `x`.
void rms_norm(Context& context, const float* x, int64_t rows, int64_t columns, const float* weight,
              double eps, float* out);

// out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over each of `rows` vectors of `columns`;
// `out` may be `x`.
void layer_norm(Context& context, const float* x, int64_t rows, int64_t columns, const float* weight,
                const float* bias, double eps, float* out);

// Rotates x (tokens, heads, dim) in place by table (positions, 2, half): cosines and sines.
void rope(Context& context, float* x, int64_t tokens, int64_t heads, int64_t dim, const float* table,
          int64_t half, const int32_t* positions, bool interleaved);

}  // namespace thermocline
