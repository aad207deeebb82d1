#include "calls.h"

#include <nanobind/ndarray.h>

#include <cmath>

namespace nb = nanobind;

namespace thermocline {
namespace {

const float* optional_vector(nb::handle object, const char* name, int64_t n) {
  return object.is_none() ? nullptr : data_of<float>(array_of<Input>(object, name), name, {n});
}

// A cache of (kv_heads, positions, head_dim), or of the bytes of Q8_0: heads may lie apart, the rows of a
// head may not.
Cache cache_of(const Output& array, const char* name, int64_t head_dim) {
  require(array.ndim() == 3, name, "is not (kv_heads, positions, head_dim)");
  const bool half = detail::is_type(array.dtype(), detail::Element::kFloat16);
  const bool bytes = detail::is_type(array.dtype(), detail::Element::kUint8);
  require(half || bytes || detail::is_type(array.dtype(), detail::Element::kFloat32), name,
          "is neither float16 nor float32, nor bytes of Q8_0");
  require(!bytes || head_dim % kBlock == 0, name, "of Q8_0 needs a head_dim of whole blocks of 32");
  const auto width = static_cast<int64_t>(array.shape(2));
  require(width == (bytes ? row_bytes(kQ8_0, head_dim) : head_dim), name, "has another head_dim than q");
  const int64_t size = bytes ? 1 : half ? 2 : 4;
  require((width <= 1 || array.stride(2) == 1) && (array.shape(1) <= 1 || array.stride(1) >= width), name,
          "does not have contiguous rows");
  return {static_cast<uint8_t*>(array.data()),
          bytes  ? kQ8_0
          : half ? kF16
                 : kF32,
          array.stride(0) * size, array.stride(1) * size};
}

}  // namespace

NormCall norm_call(const Input& x, const Input& weight, const Input* bias, double eps, const Output& out) {
  require(x.ndim() > 0, "x", "has no axis");
  const int64_t n = length(x, x.ndim() - 1);
  const float* w = data_of<float>(weight, "weight", {n});
  const float* b = bias ? data_of<float>(*bias, "bias", {n}) : nullptr;
  const auto contiguous = [&](const auto& array, const char* name) {
    switch (x.ndim()) {
      case 1:
        return data_of<float>(array, name, {n});
      case 2:
        return data_of<float>(array, name, {length(x, 0), n});
      default:
        require(x.ndim() == 3, "x", "has more than three axes");
        return data_of<float>(array, name, {length(x, 0), length(x, 1), n});
    }
  };
  const float* from = contiguous(x, "x");
  float* to = contiguous(out, "out");
  return {from, w, b, n == 0 ? 0 : static_cast<int64_t>(x.size()) / n, n, eps, to};
}

LinearCall linear_call(const Input& x, const nb::tuple& matrices, const nb::tuple& outs,
                       const std::optional<nb::tuple>& biases, bool add) {
  const size_t count = matrices.size();
  require(count <= LinearCall::kMost, "matrices", "are more than 16");
  require(outs.size() == count, "outs", "are not as many as matrices");
  require(!biases || biases->size() == count, "biases", "are not as many as matrices");
  LinearCall call{data_of<float>(x, "x", {kAny, kAny}), length(x, 0), length(x, 1),
                  static_cast<int64_t>(count),          {},           add};
  for (size_t i = 0; i < count; ++i) {
    const Matrix& matrix = nb::cast<const MatrixHandle&>(matrices[i]).matrix;
    require(matrix.cols == call.columns, "matrices", "have other columns than x");
    call.parts[i] = {matrix,
                     data_of<float>(array_of<Output>(outs[i], "outs"), "outs", {call.tokens, matrix.rows}),
                     biases ? optional_vector((*biases)[i], "biases", matrix.rows) : nullptr};
  }
  return call;
}

RopeCall rope_call(const Output& x, const Input& table, const Input& positions, bool interleaved) {
  float* to = data_of<float>(x, "x", {kAny, kAny, kAny});
  const auto tokens = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1)),
             dim = static_cast<int64_t>(x.shape(2));
  const float* values = data_of<float>(table, "table", {kAny, 2, kAny});
  const int64_t half = length(table, 2);
  require(2 * half <= dim, "table", "rotates more elements than a head has");
  const int32_t* at = data_of<int32_t>(positions, "positions", {tokens});
  return {to, tokens, heads, dim, values, length(table, 0), half, at, interleaved};
}

AttentionCall attention_call(const Input& q, const Input& k, const Input& v, const Output& keys,
                             const Output& values, float scale, int64_t window, const Output& out) {
  AttentionJob job{};
  job.q = data_of<float>(q, "q", {kAny, kAny, kAny});
  job.tokens = length(q, 0);
  job.heads = length(q, 1);
  job.head_dim = length(q, 2);
  job.keys = cache_of(keys, "keys", job.head_dim);
  job.values = cache_of(values, "values", job.head_dim);
  job.kv_heads = static_cast<int64_t>(keys.shape(0));
  require(job.kv_heads > 0 && job.heads % job.kv_heads == 0, "q",
          "has heads that are no multiple of the cache's");
  job.k = data_of<float>(k, "k", {job.tokens, job.kv_heads, job.head_dim});
  job.v = data_of<float>(v, "v", {job.tokens, job.kv_heads, job.head_dim});
  for (size_t axis = 0; axis < 2; ++axis) {
    require(keys.shape(axis) == values.shape(axis), "values", "has another shape than keys");
  }
  require(window >= 0, "window", "is negative");
  job.window = window;
  job.scale = scale;
  job.out = data_of<float>(out, "out", {job.tokens, job.heads, job.head_dim});
  return {job, static_cast<int64_t>(keys.shape(1))};
}

PredictCall predict_call(const Input& x, const MatrixHandle& fc1, const MatrixHandle& fc2,
                         const Output& scores) {
  const float* from = data_of<float>(x, "x", {kAny, fc1.matrix.cols});
  require(fc2.matrix.cols == fc1.matrix.rows, "fc2", "has another rank than fc1");
  const int64_t tokens = length(x, 0);
  return {from, tokens, &fc1.matrix, &fc2.matrix,
          data_of<float>(scores, "scores", {tokens, fc2.matrix.rows})};
}

SelectCall select_call(const Input& scores, float threshold, const Output& out) {
  const float* from = data_of<float>(scores, "scores", {kAny, kAny});
  const int64_t tokens = length(scores, 0), neurons = length(scores, 1);
  require(!std::isnan(threshold), "threshold", "is not a number");
  return {from, tokens, neurons, threshold, data_of<int32_t>(out, "out", {neurons})};
}

// Activation kinds as in ops.contract, and how the neurons of a block lie.
FfnBlock block_of(const MatrixHandle* gate, const MatrixHandle& up, const MatrixHandle& down, bool records,
                  int activation, bool both, float threshold, const std::optional<Input>& up_bias,
                  const std::optional<Input>& rows) {
  const Matrix& u = up.matrix;
  const Matrix& d = down.matrix;
  require(activation >= kSilu && activation <= kGelu, "activation", "is unknown");
  require(threshold >= 0.0f, "threshold", "is negative or not a number");
  require(!gate || (gate->matrix.rows == u.rows && gate->matrix.cols == u.cols), "gate",
          "has another shape than up");
  require(!both || gate, "both", "needs a gate");
  require(records ? d.rows == u.rows && d.cols == u.cols : d.cols == u.rows && d.rows == u.cols, "down",
          "does not have the shape that up asks for");
  require(!rows || records, "rows", "are of neuron records only");
  const int32_t* places = rows ? data_of<int32_t>(*rows, "rows", {kAny}) : nullptr;
  const int64_t neurons = rows ? length(*rows, 0) : u.rows;
  require(!records || !is_integer(d.format) || neurons <= kMostSumRows, "down",
          "has more than 65,536 neurons of an integer format");
  const float* bias = up_bias ? data_of<float>(*up_bias, "up_bias", {neurons}) : nullptr;
  return {gate ? &gate->matrix : nullptr,
          &u,
          &d,
          records,
          static_cast<Activation>(activation),
          both,
          threshold,
          bias,
          places,
          neurons,
          records && !rows && is_integer(d.format) ? down.largest() : nullptr};
}

}  // namespace thermocline
