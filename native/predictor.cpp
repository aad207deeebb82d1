#include "predictor.h"

#include <algorithm>

#include "linear.h"

namespace thermocline {

void predict(Context& context, const float* x, int64_t tokens, const Matrix& fc1, const Matrix& fc2,
             float* scores) {
  const int64_t rank = fc1.rows, neurons = fc2.rows;
  Pool& team = context.team((rank * fc1.row_bytes + neurons * fc2.row_bytes) * tokens);
  float* hidden = context.arena.take<float>(tokens * rank);
  Batch in(context, x, tokens, fc1.cols, form_of(context.kernels, fc1.format, tokens));
  Batch middle(context, hidden, tokens, rank, form_of(context.kernels, fc2.format, tokens));
  const int64_t room = std::max(dot_scratch(context.kernels, fc1.format, fc1.cols, tokens),  //
                                dot_scratch(context.kernels, fc2.format, rank, tokens));
  const Areas<float> scratch = context.arena.take_areas<float>(room, team.size());
  Streams first = context.streams(team), second = context.streams(team);
  first.reset(rank, row_grain(rank, fc1.row_bytes, tokens, team.size()), tokens == 1);
  second.reset(neurons, row_grain(neurons, fc2.row_bytes, tokens, team.size()), tokens == 1);
  team.run([&](int worker) {
    float* own = scratch.of(worker);
    fetch(fc1.data + first.begin(worker) * fc1.row_bytes);
    in.prepare(context, team);
    const DotJob down{fc1.all(context.fetching), fc1.cols, in.tokens(), hidden, rank, nullptr, false};
    first.drain(worker, [&](int64_t r0, int64_t r1) {
      dot_chunk(context.kernels, fc1.format, down, r0, r1, tokens, own);
      for (int64_t t = 0; t < tokens; ++t) {
        context.kernels.activate(kRelu, 0.0f, hidden + t * rank + r0, r1 - r0);
      }
    });
    fetch(fc2.data + second.begin(worker) * fc2.row_bytes);
    team.barrier();
    middle.prepare(context, team);
    const DotJob up{fc2.all(context.fetching), rank, middle.tokens(), scores, neurons, nullptr, false};
    second.drain(worker, [&](int64_t r0, int64_t r1) {
      dot_chunk(context.kernels, fc2.format, up, r0, r1, tokens, own);
    });
  });
}

}  // namespace thermocline
