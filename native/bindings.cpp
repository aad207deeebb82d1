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

#include "arrange.h"
#include "arrays.h"
#include "calls.h"
#include "context.h"
#include "dispatch.h"
#include "ffn.h"
#include "probes.h"
#include "reader_bindings.h"
#include "requantize.h"

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

void bind_embed(Context& context, const MatrixHandle& table, const Input& tokens, const Output& out) {
  const int32_t* ids = data_of<int32_t>(tokens, "tokens", {kAny});
  const int64_t n = length(tokens, 0);
  check_range(ids, n, table.matrix.rows, "tokens");
  float* to = data_of<float>(out, "out", {n, table.matrix.cols});
  run(context, [&] { embed(context, table.matrix, ids, n, to); });
}

void bind_rms_norm(Context& context, const Input& x, const Input& weight, double eps, const Output& out) {
  const NormCall call = norm_call(x, weight, nullptr, eps, out);
  run(context, [&] { call(context); });
}

void bind_layer_norm(Context& context, const Input& x, const Input& weight, const Input& bias, double eps,
                     const Output& out) {
  const NormCall call = norm_call(x, weight, &bias, eps, out);
  run(context, [&] { call(context); });
}

void bind_linear(Context& context, const Input& x, const nb::tuple& matrices, const nb::tuple& outs,
                 const std::optional<nb::tuple>& biases, bool add) {
  const LinearCall call = linear_call(x, matrices, outs, biases, add);
  run(context, [&] { call(context); });
}

void bind_rope(Context& context, const Output& x, const Input& table, const Input& positions,
               bool interleaved) {
  const RopeCall call = rope_call(x, table, positions, interleaved);
  run(context, [&] { call(context); });
}

void bind_attention(Context& context, const Input& q, const Input& k, const Input& v, const Output& keys,
                    const Output& values, int64_t start, float scale, int64_t window, const Output& out) {
  const AttentionCall call = attention_call(q, k, v, keys, values, scale, window, out);
  run(context, [&] { call(context, start); });
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
  const PredictCall call = predict_call(x, fc1, fc2, scores);
  run(context, [&] { call(context); });
}

int64_t bind_select(Context& context, const Input& scores, float threshold, const Output& out) {
  const SelectCall call = select_call(scores, threshold, out);
  return run(context, [&] { return call(context); });
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

void bind_arrange(Context& context, const MatrixHandle& source, const Output& out, int ggml_type) {
  const Matrix& matrix = source.matrix;
  const Format format = format_of(ggml_type);
  require(is_arranged(format) && stored(format) == matrix.format, "ggml_type",
          "is no format of memory for what the source is in");
  const int64_t bytes = row_bytes(format, matrix.cols);
  uint8_t* to = data_of<uint8_t>(out, "out", {matrix.rows, bytes});
  run(context, [&] { arrange(context, matrix, format, to); });
}

double bind_read_bandwidth(Context& context, const Input& buffer) {
  const uint8_t* data = data_of<uint8_t>(buffer, "buffer", {kAny});
  return run(context, [&] { return read_bandwidth(context, data, length(buffer, 0)).bytes_per_second; });
}

double bind_read_rows(Context& context, const MatrixHandle& handle, const std::optional<Input>& ids) {
  const Matrix& matrix = handle.matrix;
  if (!ids)
    return run(context, [&] {
      return read_bandwidth(context, matrix.data, matrix.rows * matrix.row_bytes).bytes_per_second;
    });
  const int32_t* at = data_of<int32_t>(*ids, "ids", {kAny});
  const int64_t count = length(*ids, 0);
  check_range(at, count, matrix.rows, "ids");
  return run(context, [&] { return read_rows(context, matrix, at, count).bytes_per_second; });
}

void require_threads(int threads) {
  require(threads >= 1 && threads <= 1024, "threads", "are not between 1 and 1024");
}

}  // namespace

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
      .def_prop_ro("row_bytes", [](const MatrixHandle& self) { return self.matrix.row_bytes; })
      .def_prop_ro("ggml_type",
                   [](const MatrixHandle& self) { return kFormatInfo[self.matrix.format].ggml_type; });

  nb::class_<Context>(m, "Context", "Threads, kernels and scratch memory of one engine.")
      .def(
          "__init__",
          [](Context* self, int threads, const std::string& isa, bool pin, const std::string& fetching) {
            require_threads(threads);
            new (self) Context(threads, isa, pin, fetching);
          },
          nb::arg("threads"), nb::arg("isa") = "auto", nb::arg("pin") = true, nb::arg("fetching") = "auto")
      .def_prop_ro("threads", [](const Context& self) { return self.pool.size(); })
      .def_prop_ro("isa", [](const Context& self) { return self.kernels.name; })
      .def_prop_ro("fetching",
                   [](const Context& self) { return self.fetching == kToSecond ? "second" : "first"; })
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
      .def("arrange", &bind_arrange, nb::arg("source"), nb::arg("out"), nb::arg("ggml_type"))
      .def(
          "check_finite",
          [](Context& self, const MatrixHandle& matrix) {
            return run(self, [&] { return first_nonfinite_row(self, matrix.matrix); });
          },
          nb::arg("matrix"));

  bind_reader(m);
  bind_tape(m);
  bind_handover(m);
  m.def("read_bandwidth", &bind_read_bandwidth, nb::arg("context"), nb::arg("buffer"));
  m.def("read_rows", &bind_read_rows, nb::arg("context"), nb::arg("matrix"), nb::arg("ids").none());
  m.def(
      "tile_rate",
      [](Context& context, bool bytes) { return run(context, [&] { return tile_rate(context, bytes); }); },
      nb::arg("context"), nb::arg("int8"));
}

}  // namespace thermocline
