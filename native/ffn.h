// The feed-forward network of a layer, neuron by neuron.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

struct FfnBlock {
  const Matrix* gate;  // null if the family has none
  const Matrix* up;
  const Matrix* down;  // a row per neuron if `records`, else a row per output
  bool records;
  Activation activation;
  bool both;
  float threshold;
  const float* up_bias;  // (neurons), or null
  const int32_t* rows;   // of each neuron its row in the matrices (records only), or null: its own number
  int64_t neurons;
  const LargestScales* largest;  // of the rows of down, kept from call to call; null where rows may change
};

struct FfnWork {
  int64_t gate_rows, up_rows, down_rows, fired;
};

// Adds the block's part for x (tokens, columns) to out (tokens, columns). `active` holds `n_active` ascending
// neuron ids, or is null for all. With `skip` (records only) neurons that are zero for every token cost no
// more rows. `hidden` (tokens, neurons) receives the activations, unless null.
//
// The sum over neurons is exact in integer formats (DownSums), and else cut into kGroups sums by the neuron's
// id, each taken in ascending order, which are added in order: the result does not depend on threads, on
// skipping, on where rows lie, nor on the other tokens of the batch.
FfnWork ffn(Context& context, const float* x, int64_t tokens, const FfnBlock& block, const int32_t* active,
            int64_t n_active, bool skip, float* out, float* hidden);

}  // namespace thermocline
