// The Python face of tapes: the ops' arguments are checked once, when they are written down.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings.h"
#include "calls.h"
#include "tape.h"

namespace nb = nanobind;

namespace thermocline {
namespace {

template <class Call>
void keep(Tape& tape, const Call& call) {
  tape.add([call](Context& context, FfnWork&) { call(context); });
}

void add_rms_norm(Tape& tape, const Input& x, const Input& weight, double eps, const Output& out) {
  keep(tape, norm_call(x, weight, nullptr, eps, out));
}

void add_layer_norm(Tape& tape, const Input& x, const Input& weight, const Input& bias, double eps,
                    const Output& out) {
  keep(tape, norm_call(x, weight, &bias, eps, out));
}

void add_linear(Tape& tape, const Input& x, const nb::tuple& matrices, const nb::tuple& outs,
                const std::optional<nb::tuple>& biases, bool add) {
  keep(tape, linear_call(x, matrices, outs, biases, add));
}

void add_rope(Tape& tape, const Output& x, const Input& table, const Input& positions, bool interleaved) {
  keep(tape, rope_call(x, table, positions, interleaved));
}

void add_attention(Tape& tape, const Input& q, const Input& k, const Input& v, const Output& keys,
                   const Output& values, const Input& start, float scale, int64_t window, const Output& out) {
  const AttentionCall call = attention_call(q, k, v, keys, values, scale, window, out);
  const int32_t* at = data_of<int32_t>(start, "start", {1});
  tape.add([call, at](Context& context, FfnWork&) { call(context, *at); });
}

void add_ffn(Tape& tape, const Input& x, const MatrixHandle* gate, const MatrixHandle& up,
             const MatrixHandle& down, bool records, int activation, bool both, float threshold,
             const std::optional<Input>& up_bias, const std::optional<Input>& active,
             const std::optional<Input>& count, const Output& out, bool skip_zeros) {
  const FfnBlock block =
      block_of(gate, up, down, records, activation, both, threshold, up_bias, std::nullopt);
  const float* from = data_of<float>(x, "x", {kAny, block.up->cols});
  const int64_t tokens = length(x, 0);
  require(active.has_value() == count.has_value(), "count", "and active go together");
  const int32_t* ids = active ? data_of<int32_t>(*active, "active", {block.neurons}) : nullptr;
  const int32_t* listed = count ? data_of<int32_t>(*count, "count", {1}) : nullptr;
  float* to = data_of<float>(out, "out", {tokens, block.up->cols});
  tape.add([=](Context& context, FfnWork& work) {
    const int64_t some = listed ? *listed : block.neurons;
    if (ids && !is_active_list(ids, some, block.neurons))
      throw std::runtime_error("a list of neurons is damaged");
    if (some > 0) add_to(work, ffn(context, from, tokens, block, ids, some, skip_zeros, to, nullptr));
  });
}

void add_predict(Tape& tape, const Input& x, const MatrixHandle& fc1, const MatrixHandle& fc2,
                 const Output& scores) {
  keep(tape, predict_call(x, fc1, fc2, scores));
}

void add_select(Tape& tape, const Input& scores, float threshold, const Output& out, const Output& count) {
  const SelectCall call = select_call(scores, threshold, out);
  int32_t* found = data_of<int32_t>(count, "count", {1});
  tape.add([call, found](Context& context, FfnWork&) { *found = static_cast<int32_t>(call(context)); });
}

// Arrays of any shape with as many elements each.
std::tuple<const float*, float*, int64_t> pair_of(const Input& from, const Output& to) {
  const auto flat = [](const auto& array, const char* name) {
    require(array.ndim() == 1 || array.ndim() == 2, name, "has not one or two axes");
    return array.ndim() == 1 ? data_of<float>(array, name, {kAny})
                             : data_of<float>(array, name, {kAny, kAny});
  };
  require(from.size() == to.size(), "source", "is not as long as out");
  return {flat(from, "source"), flat(to, "out"), static_cast<int64_t>(from.size())};
}

void add_sum(Tape& tape, const Output& x, const Input& y) {
  const auto [from, to, n] = pair_of(y, x);
  tape.add([from = from, to = to, n = n](Context&, FfnWork&) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  });
}

void add_copy(Tape& tape, const Input& source, const Output& out) {
  const auto [from, to, n] = pair_of(source, out);
  tape.add([from = from, to = to, n = n](Context&, FfnWork&) { std::copy(from, from + n, to); });
}

std::tuple<int64_t, int64_t, int64_t, int64_t> play(const Tape& tape, Context& context) {
  FfnWork work{};
  {
    nb::gil_scoped_release release;
    work = tape.play(context);
  }
  return {work.gate_rows, work.up_rows, work.down_rows, work.fired};
}

}  // namespace

void bind_tape(nb::module_& m) {
  using Kept = nb::keep_alive<1, 2>;
  nb::class_<Tape>(m, "Tape", "Ops that are written down once and played again; it keeps their arrays alive.")
      .def(nb::init<>())
      .def("rms_norm", &add_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"), Kept(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>())
      .def("layer_norm", &add_layer_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
           nb::arg("out"), Kept(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 6>())
      .def("linear", &add_linear, nb::arg("x"), nb::arg("matrices"), nb::arg("outs"),
           nb::arg("biases").none(), nb::arg("add"), Kept(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
           nb::keep_alive<1, 5>())
      .def("rope", &add_rope, nb::arg("x"), nb::arg("table"), nb::arg("positions"), nb::arg("interleaved"),
           Kept(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("attention", &add_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("keys"),
           nb::arg("values"), nb::arg("start"), nb::arg("scale"), nb::arg("window"), nb::arg("out"), Kept(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 7>(), nb::keep_alive<1, 10>())
      .def("ffn", &add_ffn, nb::arg("x"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("records"), nb::arg("activation"), nb::arg("both"), nb::arg("threshold"),
           nb::arg("up_bias").none(), nb::arg("active").none(), nb::arg("count").none(), nb::arg("out"),
           nb::arg("skip_zeros"), Kept(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(),
           nb::keep_alive<1, 5>(), nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>(), nb::keep_alive<1, 12>(),
           nb::keep_alive<1, 13>())
      .def("predict", &add_predict, nb::arg("x"), nb::arg("fc1"), nb::arg("fc2"), nb::arg("scores"), Kept(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("select", &add_select, nb::arg("scores"), nb::arg("threshold"), nb::arg("out"), nb::arg("count"),
           Kept(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("add", &add_sum, nb::arg("x"), nb::arg("y"), Kept(), nb::keep_alive<1, 3>())
      .def("copy", &add_copy, nb::arg("source"), nb::arg("out"), Kept(), nb::keep_alive<1, 3>())
      .def("play", &play, nb::arg("context"))
      .def("__len__", &Tape::size);
}

}  // namespace thermocline
