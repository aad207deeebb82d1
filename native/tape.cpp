#include "tape.h"

namespace thermocline {

FfnWork Tape::play(Context& context) const {
  FfnWork work{0, 0, 0, 0};
  for (const Op& op : ops_) {
    const OpScope scope(context);
    op(context, work);
  }
  return work;
}

bool is_active_list(const int32_t* ids, int64_t count, int64_t neurons) {
  if (count < 0 || count > neurons) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= neurons || (i > 0 && ids[i - 1] >= ids[i])) return false;
  }
  return true;
}

}  // namespace thermocline
