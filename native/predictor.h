// Low-rank networks that foretell which neurons will fire.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// scores (tokens, neurons) = fc2 (neurons, rank) . relu(fc1 (rank, columns) . x), of x (tokens, columns).
void predict(Context& context, const float* x, int64_t tokens, const Matrix& fc1, const Matrix& fc2,
             float* scores);

}  // namespace thermocline
