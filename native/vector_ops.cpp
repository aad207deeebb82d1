#include "vector_ops.h"

namespace thermocline {
namespace {

// body(begin, end) over `count` vectors of `bytes` each, by all workers if there is enough to do.
template <class Body>
void share(Context& context, int64_t count, int64_t bytes, Body body) {
  constexpr int64_t kGrain = 8;
  Items items;
  items.reset(count, kGrain);
  context.team(count * bytes).run([&](int) { items.drain(body); });
}

}  // namespace

void embed(Context& context, const Matrix& table, const int32_t* ids, int64_t tokens, float* out) {
  share(context, tokens, table.cols * 4, [&](int64_t begin, int64_t end) {
    context.kernels.dequantize[table.format](table.at(ids, end), begin, end, 0, table.cols,
                                             out + begin * table.cols, table.cols);
  });
}

void rms_norm(Context& context, const float* x, int64_t rows, int64_t columns, const float* weight,
              double eps, float* out) {
  share(context, rows, columns * 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      context.kernels.rms_norm(x + r * columns, weight, eps, out + r * columns, columns);
    }
  });
}

void layer_norm(Context& context, const float* x, int64_t rows, int64_t columns, const float* weight,
                const float* bias, double eps, float* out) {
  share(context, rows, columns * 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      context.kernels.layer_norm(x + r * columns, weight, bias, eps, out + r * columns, columns);
    }
  });
}

void rope(Context& context, float* x, int64_t tokens, int64_t heads, int64_t dim, const float* table,
          int64_t half, const int32_t* positions, bool interleaved) {
  share(context, tokens, heads * dim * 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* cosine = table + positions[t] * 2 * half;
      for (int64_t h = 0; h < heads; ++h) {
        context.kernels.rope(x + (t * heads + h) * dim, cosine, cosine + half, half, interleaved);
      }
    }
  });
}

}  // namespace thermocline
