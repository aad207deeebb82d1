// Ops that are written down once and played again without Python, over the same arrays with other contents.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "context.h"
#include "ffn.h"

namespace thermocline {

class Tape {
 public:
  // One op; adds what it did of an FFN to `work`. Throws if what an array holds cannot be.
  using Op = std::function<void(Context& context, FfnWork& work)>;

  void add(Op op) { ops_.push_back(std::move(op)); }

  // All ops in order, each as a call of its own; stops at the first that throws.
  FfnWork play(Context& context) const;

  size_t size() const { return ops_.size(); }

 private:
  std::vector<Op> ops_;
};

// Whether `ids` are `count` ascending numbers below `neurons`.
bool is_active_list(const int32_t* ids, int64_t count, int64_t neurons);

inline void add_to(FfnWork& sum, const FfnWork& more) {
  sum = {sum.gate_rows + more.gate_rows, sum.up_rows + more.up_rows, sum.down_rows + more.down_rows,
         sum.fired + more.fired};
}

}  // namespace thermocline
