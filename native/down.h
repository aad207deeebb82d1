// Down projection over neuron records: a weighted sum of rows, of floats in a fixed order.
#pragma once

#include <cstdint>
#include <optional>

#include "context.h"
#include "down_panels.h"
#include "down_sums.h"
#include "matrix.h"

namespace thermocline {

// Neighbouring neurons (a cluster) lie together in memory and go to the same group; the groups take turns, so
// that they are of equal length however the active neurons lie.
constexpr int kGroups = 8;
constexpr int kClusterShift = 6;

class DownRecords {
 public:
  // Takes scratch for lists of up to `most` neurons and for the partial sums; `largest` and `weighed` as
  // DownSums has them.
  DownRecords(Context& context, Pool& team, const Matrix& down, const LargestScales* largest, int64_t tokens,
              int64_t most, bool weighed);

  // As DownSums has it, for places of a list without `wanted`, or of which all that is not wanted has an h of
  // 0.
  void weigh(int worker, const int32_t* rows, const float* h, int64_t k0, int64_t k1) {
    if (sums_) sums_->weigh(worker, rows, h, k0, k1);
  }

  // Serial: what to add. Neuron i of `count` has the id ids[i] (i if null), its row at rows[i] (at its id if
  // null) and the activations h[t * h_stride + i]; it is left out where `wanted` is given and wanted[i] is 0.
  void list(const int32_t* ids, const int32_t* rows, const uint8_t* wanted, int64_t count, const float* h,
            int64_t h_stride);

  // In a parallel section, after list(): adds the rows to out (tokens, columns).
  void add(int worker, float* out);

 private:
  void add_one(float* out);
  // Lists the places of what is not zero for a token.
  void find_fired(int64_t t);
  void add_tile(int worker, int64_t item, float* out);

  Context& context_;
  Pool& team_;
  const Matrix& down_;
  int64_t tokens_, column_parts_, token_parts_, tile_columns_;
  const float* h_ = nullptr;
  int64_t h_stride_ = 0;
  int32_t *ids_, *positions_;
  int64_t start_[kGroups + 1] = {};
  float* parts_ = nullptr;    // one token: (kGroups, columns)
  Areas<float> scratch_;      // more: per worker a tile of weights, two of sums, and places in the lists
  int32_t* fired_ = nullptr;  // more: per token an ascending list of places, and an end
  int64_t most_ = 0;
  Items items_, reduce_, token_items_;
  // One of these does it all: where panels are faster, and in the other integer formats.
  std::optional<DownPanels> panels_;
  std::optional<DownSums> sums_;
};

}  // namespace thermocline
