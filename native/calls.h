// Ops with checked arguments: what the Python face calls at once, and a tape keeps for later. Arguments stay
// the caller's to keep alive.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <optional>

#include "arrays.h"
#include "attention.h"
#include "bindings.h"
#include "linear.h"
#include "predictor.h"
#include "vector_ops.h"

namespace thermocline {

inline int64_t length(const Input& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

inline void check_range(const int32_t* ids, int64_t n, int64_t end, const char* name) {
  for (int64_t i = 0; i < n; ++i) require(ids[i] >= 0 && ids[i] < end, name, "holds an index out of range");
}

// RMSNorm, or LayerNorm if there is a bias.
struct NormCall {
  const float *x, *weight, *bias;
  int64_t rows, columns;
  double eps;
  float* out;

  void operator()(Context& context) const {
    if (rows == 0) return;
    bias ? layer_norm(context, x, rows, columns, weight, bias, eps, out)
         : rms_norm(context, x, rows, columns, weight, eps, out);
  }
};

NormCall norm_call(const Input& x, const Input& weight, const Input* bias, double eps, const Output& out);

struct LinearCall {
  static constexpr size_t kMost = 16;
  const float* x;
  int64_t tokens, columns, count;
  std::array<LinearPart, kMost> parts;
  bool add;

  void operator()(Context& context) const { linear(context, x, tokens, columns, parts.data(), count, add); }
};

LinearCall linear_call(const Input& x, const nanobind::tuple& matrices, const nanobind::tuple& outs,
                       const std::optional<nanobind::tuple>& biases, bool add);

struct RopeCall {
  float* x;
  int64_t tokens, heads, dim;
  const float* table;
  int64_t length, half;
  const int32_t* positions;
  bool interleaved;

  void operator()(Context& context) const {
    check_range(positions, tokens, length, "positions");
    rope(context, x, tokens, heads, dim, table, half, positions, interleaved);
  }
};

RopeCall rope_call(const Output& x, const Input& table, const Input& positions, bool interleaved);

struct AttentionCall {
  AttentionJob job;  // but for its start
  int64_t room;

  void operator()(Context& context, int64_t start) const {
    require(start >= 0 && start <= room - job.tokens, "start", "leaves no room in the cache for the tokens");
    AttentionJob now = job;
    now.start = start;
    attention(context, now);
  }
};

AttentionCall attention_call(const Input& q, const Input& k, const Input& v, const Output& keys,
                             const Output& values, float scale, int64_t window, const Output& out);

struct PredictCall {
  const float* x;
  int64_t tokens;
  const Matrix *fc1, *fc2;
  float* scores;

  void operator()(Context& context) const { predict(context, x, tokens, *fc1, *fc2, scores); }
};

PredictCall predict_call(const Input& x, const MatrixHandle& fc1, const MatrixHandle& fc2,
                         const Output& scores);

struct SelectCall {
  const float* scores;
  int64_t tokens, neurons;
  float threshold;
  int32_t* out;

  int64_t operator()(Context& context) const {
    return context.kernels.select(scores, tokens, neurons, threshold, out);
  }
};

SelectCall select_call(const Input& scores, float threshold, const Output& out);

}  // namespace thermocline
