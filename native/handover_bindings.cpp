// The Python face of the hand-over between a device and the CPU.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <atomic>
#include <memory>
#include <tuple>

#include "bindings.h"
#include "handover.h"

namespace nb = nanobind;

namespace thermocline {
namespace {

// The worker with the arrays of its mailbox, which it keeps alive.
struct HandOverHandle {
  HandOverHandle(Context& context, Output words, Input x, Output partial, Input active, Input count,
                 double patience)
      : arrays{words, x, partial, active, count} {
    require(patience > 0, "patience", "is not a positive number of seconds");
    auto* flags = reinterpret_cast<uint32_t*>(data_of<int32_t>(words, "words", {64}));
    const auto columns = static_cast<int64_t>(x.shape(0));
    box = {flags,
           flags + 32,
           data_of<float>(x, "x", {kAny}),
           data_of<float>(partial, "partial", {columns}),
           data_of<int32_t>(active, "active", {kAny}),
           data_of<int32_t>(count, "count", {1}),
           columns,
           static_cast<int64_t>(active.shape(0))};
    hand = std::make_unique<HandOver>(context, box, patience);
  }

  std::tuple<Output, Input, Output, Input, Input> arrays;
  Mailbox box;
  std::atomic<bool> cancelled{false};
  std::unique_ptr<HandOver> hand;  // the last to be made, the first to go
};

uint32_t add_layer(HandOverHandle& self, const MatrixHandle* gate, const MatrixHandle& up,
                   const MatrixHandle& down, bool records, int activation, bool both, float threshold,
                   const std::optional<Input>& up_bias, const std::optional<Input>& rows, bool skip,
                   bool listed) {
  const FfnBlock block = block_of(gate, up, down, records, activation, both, threshold, up_bias, rows);
  require(block.up->cols == self.box.columns, "up", "has other columns than the mailbox");
  require(!listed || block.neurons <= self.box.room, "up", "has more neurons than the mailbox lists");
  return self.hand->add_layer(block, skip, listed);
}

}  // namespace

void bind_handover(nb::module_& m) {
  nb::class_<HandOverHandle>(m, "HandOver",
                             "A worker that computes the cold neurons which a device hands over.")
      .def(nb::init<Context&, Output, Input, Output, Input, Input, double>(), nb::arg("context"),
           nb::arg("words"), nb::arg("x"), nb::arg("partial"), nb::arg("active"), nb::arg("count"),
           nb::arg("patience"), nb::keep_alive<1, 2>())
      .def("add_layer", &add_layer, nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("records"), nb::arg("activation"), nb::arg("both"), nb::arg("threshold"),
           nb::arg("up_bias").none(), nb::arg("rows").none(), nb::arg("skip"), nb::arg("listed"),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 9>(),
           nb::keep_alive<1, 10>())
      .def(
          "add_tape", [](HandOverHandle& self, const Tape& tape) { return self.hand->add_tape(tape); },
          nb::arg("tape"), nb::keep_alive<1, 2>())
      .def(
          "begin", [](HandOverHandle& self) { return self.hand->begin(); },
          nb::call_guard<nb::gil_scoped_release>())
      .def("end", [](HandOverHandle& self) { return self.hand->end(); })
      .def(
          "post", [](HandOverHandle& self, uint32_t number) { self.hand->post(number); }, nb::arg("number"))
      .def(
          "wait", [](HandOverHandle& self, uint32_t number) { return self.hand->await(number); },
          nb::arg("number"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "release",
          [](HandOverHandle& self, const std::string& reason) { return self.hand->release(reason); },
          nb::arg("reason"))
      .def("take_work",
           [](HandOverHandle& self) {
             const FfnWork work = self.hand->take_work();
             return std::make_tuple(work.gate_rows, work.up_rows, work.down_rows, work.fired);
           })
      .def(
          "argument",
          [](HandOverHandle& self, uint32_t number) {
            return reinterpret_cast<uintptr_t>(self.hand->argument(number));
          },
          nb::arg("number"))
      .def(
          "inject",
          [](HandOverHandle& self, int fault, int64_t crossing, double seconds) {
            require(fault >= 0 && fault <= static_cast<int>(Fault::kStall), "fault", "is unknown");
            self.hand->inject(static_cast<Fault>(fault), crossing, seconds);
          },
          nb::arg("fault"), nb::arg("crossing"), nb::arg("seconds") = 0.0)
      .def(
          "simulate",
          [](HandOverHandle& self, uint32_t layers, int64_t crossings) {
            require(layers > 0, "layers", "are none");
            self.cancelled.store(false);
            Simulated done{};
            {
              nb::gil_scoped_release release;
              done = simulate(*self.hand, self.box, layers, crossings, &self.cancelled);
            }
            return std::make_tuple(done.crossings, done.different, done.seconds);
          },
          nb::arg("layers"), nb::arg("crossings"))
      .def("cancel", [](HandOverHandle& self) { self.cancelled.store(true); })
      .def_prop_ro("alive", [](const HandOverHandle& self) { return self.hand->alive(); })
      .def_prop_ro("crossings", [](const HandOverHandle& self) { return self.hand->crossings(); });

  m.def("handover_functions", [] {
    return std::make_tuple(reinterpret_cast<uintptr_t>(post_function()),
                           reinterpret_cast<uintptr_t>(await_function()));
  });
}

}  // namespace thermocline
