// The Python face of the kernels: checks arguments, lets go of the interpreter, calls the op.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "context.h"
#include "dispatch.h"
#include "ffn.h"
#include "linear.h"
#include "predictor.h"
#include "probes.h"
#include "reader_bindings.h"
#include "requantize.h"
#include "vector_ops.h"

namespace nb = nanobind;

namespace thermocline {
namespace {

// One op on the context, with the interpreter released.
template <class Op>
auto run(Context& context, Op&& op) {
  nb::gil_scoped_release release;
  const OpScope scope(context);
  return op();
}

int64_t length(const Input& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

const float* optional_vector(nb::handle object, const char* name, int64_t n) {
  return object.is_none() ? nullptr : data_of<float>(array_of<Input>(object, name), name, {n});
}

void check_range(const int32_t* ids, int64_t n, int64_t end, const char* name) {
  for (int64_t i = 0; i < n; ++i) require(ids[i] >= 0 && ids[i] < end, name, "holds an index out of range");
}

void bind_embed(Context& context, const MatrixHandle& table, const Input& tokens, const Output& out) {
  const int32_t* ids = data_of<int32_t>(tokens, "tokens", {kAny});
  const int64_t n = length(tokens, 0);
  check_range(ids, n, table.matrix.rows, "tokens");
  float* to = data_of<float>(out, "out", {n, table.matrix.cols});
  run(context, [&] { embed(context, table.matrix, ids, n, to); });
}

// RMSNorm, or LayerNorm if there is a bias.
void bind_norm(Context& context, const Input& x, const Input& weight, const Input* bias, double eps,
               const Output& out) {
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
  if (n == 0) return;
  const int64_t rows = static_cast<int64_t>(x.size()) / n;
  run(context, [&] {
    b ? layer_norm(context, from, rows, n, w, b, eps, to) : rms_norm(context, from, rows, n, w, eps, to);
  });
}

void bind_rms_norm(Context& context, const Input& x, const Input& weight, double eps, const Output& out) {
  bind_norm(context, x, weight, nullptr, eps, out);
}

void bind_layer_norm(Context& context, const Input& x, const Input& weight, const Input& bias, double eps,
                     const Output& out) {
  bind_norm(context, x, weight, &bias, eps, out);
}

void bind_linear(Context& context, const Input& x, const nb::tuple& matrices, const nb::tuple& outs,
                 const std::optional<nb::tuple>& biases, bool add) {
  constexpr size_t kMost = 16;
  const size_t count = matrices.size();
  require(count <= kMost, "matrices", "are more than 16");
  require(outs.size() == count, "outs", "are not as many as matrices");
  require(!biases || biases->size() == count, "biases", "are not as many as matrices");
  const float* from = data_of<float>(x, "x", {kAny, kAny});
  const int64_t tokens = length(x, 0), columns = length(x, 1);
  LinearPart parts[kMost];
  for (size_t i = 0; i < count; ++i) {
    const Matrix& matrix = nb::cast<const MatrixHandle&>(matrices[i]).matrix;
    require(matrix.cols == columns, "matrices", "have other columns than x");
    parts[i] = {matrix, data_of<float>(array_of<Output>(outs[i], "outs"), "outs", {tokens, matrix.rows}),
                biases ? optional_vector((*biases)[i], "biases", matrix.rows) : nullptr};
  }
  run(context, [&] { linear(context, from, tokens, columns, parts, static_cast<int64_t>(count), add); });
}

void bind_rope(Context& context, const Output& x, const Input& table, const Input& positions,
               bool interleaved) {
  float* to = data_of<float>(x, "x", {kAny, kAny, kAny});
  const auto tokens = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1)),
             dim = static_cast<int64_t>(x.shape(2));
  const float* values = data_of<float>(table, "table", {kAny, 2, kAny});
  const int64_t half = length(table, 2);
  require(2 * half <= dim, "table", "rotates more elements than a head has");
  const int32_t* at = data_of<int32_t>(positions, "positions", {tokens});
  check_range(at, tokens, length(table, 0), "positions");
  run(context, [&] { rope(context, to, tokens, heads, dim, values, half, at, interleaved); });
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

void bind_attention(Context& context, const Input& q, const Input& k, const Input& v, const Output& keys,
                    const Output& values, int64_t start, float scale, int64_t window, const Output& out) {
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
  const auto room = static_cast<int64_t>(keys.shape(1));
  require(start >= 0 && start <= room - job.tokens, "start", "leaves no room in the cache for the tokens");
  require(window >= 0, "window", "is negative");
  job.start = start;
  job.window = window;
  job.scale = scale;
  job.out = data_of<float>(out, "out", {job.tokens, job.heads, job.head_dim});
  run(context, [&] { attention(context, job); });
}

const int32_t* active_of(const std::optional<Input>& active, int64_t neurons, int64_t* count) {
  static const int32_t kNobody = 0;
  *count = neurons;
  if (!active) return nullptr;
  const int32_t* ids = data_of<int32_t>(*active, "active", {kAny});
  *count = length(*active, 0);
  if (*count == 0) return &kNobody;
  for (int64_t i = 1; i < *count; ++i) require(ids[i - 1] < ids[i], "active", "is not strictly ascending");
  require(ids[0] >= 0 && ids[*count - 1] < neurons, "active", "holds an index out of range");
  return ids;
}

std::tuple<int64_t, int64_t, int64_t, int64_t> bind_ffn(
    Context& context, const Input& x, const MatrixHandle* gate, const MatrixHandle& up,
    const MatrixHandle& down, bool records, int activation, bool both, float threshold,
    const std::optional<Input>& up_bias, const std::optional<Input>& rows, const std::optional<Input>& active,
    const Output& out, bool skip_zeros, const std::optional<Output>& hidden) {
  const FfnBlock block = block_of(gate, up, down, records, activation, both, threshold, up_bias, rows);
  const float* from = data_of<float>(x, "x", {kAny, block.up->cols});
  const int64_t tokens = length(x, 0);
  int64_t count = 0;
  const int32_t* ids = active_of(active, block.neurons, &count);
  for (int64_t i = 0; block.rows && i < count; ++i) {
    const int32_t row = block.rows[ids ? ids[i] : i];
    require(row >= 0 && row < block.up->rows, "rows", "do not tell where an active neuron lies");
  }
  float* to = data_of<float>(out, "out", {tokens, block.up->cols});
  float* h = hidden ? data_of<float>(*hidden, "hidden", {tokens, block.neurons}) : nullptr;
  const FfnWork work =
      run(context, [&] { return ffn(context, from, tokens, block, ids, count, skip_zeros, to, h); });
  return {work.gate_rows, work.up_rows, work.down_rows, work.fired};
}

void bind_predict(Context& context, const Input& x, const MatrixHandle& fc1, const MatrixHandle& fc2,
                  const Output& scores) {
  const float* from = data_of<float>(x, "x", {kAny, fc1.matrix.cols});
  require(fc2.matrix.cols == fc1.matrix.rows, "fc2", "has another rank than fc1");
  const int64_t tokens = length(x, 0);
  float* to = data_of<float>(scores, "scores", {tokens, fc2.matrix.rows});
  run(context, [&] { predict(context, from, tokens, fc1.matrix, fc2.matrix, to); });
}

int64_t bind_select(Context& context, const Input& scores, float threshold, const Output& out) {
  const float* from = data_of<float>(scores, "scores", {kAny, kAny});
  const int64_t tokens = length(scores, 0), neurons = length(scores, 1);
  require(!std::isnan(threshold), "threshold", "is not a number");
  int32_t* to = data_of<int32_t>(out, "out", {neurons});
  return run(context, [&] { return context.kernels.select(from, tokens, neurons, threshold, to); });
}

std::tuple<double, double, double> bind_transpose(Context& context, const MatrixHandle& source,
                                                  const Output& out, int ggml_type) {
  const Format format = format_of(ggml_type);
  require(!is_k_quant(format), "ggml_type", "is a K-quant, which is not written here");
  uint8_t* to = data_of<uint8_t>(out, "out", {source.matrix.cols, row_bytes(format, source.matrix.rows)});
  const RequantizeError error =
      run(context, [&] { return transpose_requantize(context, source.matrix, format, to); });
  return {error.max_abs, error.rms, error.source};
}

double bind_read_bandwidth(Context& context, const Input& buffer) {
  const uint8_t* data = data_of<uint8_t>(buffer, "buffer", {kAny});
  return run(context, [&] { return read_bandwidth(context, data, length(buffer, 0)).bytes_per_second; });
}

void require_threads(int threads) {
  require(threads >= 1 && threads <= 1024, "threads", "are not between 1 and 1024");
}

}  // namespace

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
          neurons};
}

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of thermocline";
  // A context may live until the process ends; that is no leak worth a warning.
  nb::set_leak_warnings(false);

  m.def("isa_levels", &isa_levels, "Kernel levels that this CPU can run, weakest first.");
  m.def("cpu_features", [] {
    nb::dict features;
    for (const auto& [name, present] : cpu_features()) features[name.c_str()] = present;
    return features;
  });

  nb::class_<MatrixHandle>(m, "Matrix",
                           "A matrix in a block format, on the bytes of an array that it keeps alive.")
      .def(nb::init<Input, int, int64_t, int64_t>(), nb::arg("data"), nb::arg("ggml_type"), nb::arg("rows"),
           nb::arg("cols"))
      .def_prop_ro("rows", [](const MatrixHandle& self) { return self.matrix.rows; })
      .def_prop_ro("cols", [](const MatrixHandle& self) { return self.matrix.cols; })
      .def_prop_ro("ggml_type",
                   [](const MatrixHandle& self) { return kFormatInfo[self.matrix.format].ggml_type; });

  nb::class_<Context>(m, "Context", "Threads, kernels and scratch memory of one engine.")
      .def(
          "__init__",
          [](Context* self, int threads, const std::string& isa, bool pin) {
            require_threads(threads);
            new (self) Context(threads, isa, pin);
          },
          nb::arg("threads"), nb::arg("isa") = "auto", nb::arg("pin") = true)
      .def_prop_ro("threads", [](const Context& self) { return self.pool.size(); })
      .def_prop_ro("isa", [](const Context& self) { return self.kernels.name; })
      .def_prop_ro("scratch_bytes", [](const Context& self) { return self.arena.capacity(); })
      .def("park", [](Context& self) { self.pool.park(); })
      .def("embed", &bind_embed, nb::arg("table"), nb::arg("tokens"), nb::arg("out"))
      .def("rms_norm", &bind_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"))
      .def("layer_norm", &bind_layer_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
           nb::arg("out"))
      .def("linear", &bind_linear, nb::arg("x"), nb::arg("matrices"), nb::arg("outs"),
           nb::arg("biases").none(), nb::arg("add"))
      .def("rope", &bind_rope, nb::arg("x"), nb::arg("table"), nb::arg("positions"), nb::arg("interleaved"))
      .def("attention", &bind_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("keys"),
           nb::arg("values"), nb::arg("start"), nb::arg("scale"), nb::arg("window"), nb::arg("out"))
      .def("ffn", &bind_ffn, nb::arg("x"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("records"), nb::arg("activation"), nb::arg("both"), nb::arg("threshold"),
           nb::arg("up_bias").none(), nb::arg("rows").none(), nb::arg("active").none(), nb::arg("out"),
           nb::arg("skip_zeros"), nb::arg("hidden").none())
      .def("predict", &bind_predict, nb::arg("x"), nb::arg("fc1"), nb::arg("fc2"), nb::arg("scores"))
      .def("select", &bind_select, nb::arg("scores"), nb::arg("threshold"), nb::arg("out"))
      .def("transpose_requantize", &bind_transpose, nb::arg("source"), nb::arg("out"), nb::arg("ggml_type"))
      .def(
          "check_finite",
          [](Context& self, const MatrixHandle& matrix) {
            return run(self, [&] { return first_nonfinite_row(self, matrix.matrix); });
          },
          nb::arg("matrix"));

  bind_reader(m);
  bind_handover(m);
  m.def("read_bandwidth", &bind_read_bandwidth, nb::arg("context"), nb::arg("buffer"));
}

}  // namespace thermocline
