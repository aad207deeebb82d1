// Down projection over neuron records for a batch of tokens, all rows at once: by panels, where the level
// makes them of a matrix whose rows are summed over.
#pragma once

#include <cstdint>

#include "context.h"
#include "matrix.h"

namespace thermocline {

// Neurons are taken in steps of 32 neighbours by id, in ascending order, with zeros for those that are left
// out; steps without any are skipped. So the sums depend neither on what is skipped nor on who shares the
// batch.
class DownPanels {
 public:
  // Whether a batch of so many tokens goes this way.
  static bool pays(const Kernels& kernels, Format format, int64_t tokens);

  DownPanels(Context& context, Pool& team, const Matrix& down, int64_t tokens);

  // As DownRecords has them.
  void list(const int32_t* ids, const int32_t* rows, const uint8_t* wanted, int64_t count, const float* h,
            int64_t h_stride);
  void add(int worker, float* out);

 private:
  void pair_group(int worker, int64_t group);
  void add_part(int worker, int64_t item, float* out);

  Context& context_;
  Pool& team_;
  const Matrix& down_;
  const int64_t tokens_;
  const float* h_ = nullptr;
  int64_t h_stride_ = 0, steps_ = 0;
  int32_t *rows_ = nullptr, *sources_ = nullptr;  // (steps, 32): a record's row, and its place in h; or -1
  uint16_t* pairs_ = nullptr;
  Areas<float> wide_;  // (kGroupTokens, steps * 32): activations by step
  Areas<uint8_t> panels_;
  int64_t wide_size_ = 0, column_parts_, token_parts_;
  int64_t parts_ = 1;  // numbers of BF16 for each number
  Items groups_, items_;
};

}  // namespace thermocline
