// The Python face of the reader: checks every offset and length, so that no read writes where it should not.
#include "reader_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cerrno>
#include <memory>
#include <system_error>

#include "arrays.h"
#include "mapping.h"
#include "reader.h"

namespace nb = nanobind;

namespace thermocline {
namespace {

constexpr int kMostDepth = 256;
constexpr int64_t kMostBytes = int64_t{1} << 30;

// Raises OSError with its number, so that Python says what the system said.
[[noreturn]] void raise(const std::system_error& error) {
  PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
  throw nb::python_error();
}

template <class Call>
auto guarded(Call&& call) {
  try {
    nb::gil_scoped_release release;
    return call();
  } catch (const std::system_error& error) {
    raise(error);
  }
}

const int64_t* rows_of(const Input& array, const char* name, int64_t* count) {
  const nb::dlpack::dtype type = array.dtype();
  const bool whole = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Int) && type.bits == 64;
  require(whole && type.lanes == 1, name, "is not int64");
  require(array.ndim() == 2 && array.shape(1) == 3, name, "is not (n, 3)");
  *count = static_cast<int64_t>(array.shape(0));
  require(*count <= 1 || (array.stride(1) == 1 && array.stride(0) == 3), name, "is not contiguous");
  require(*count != 1 || array.stride(1) == 1, name, "is not contiguous");
  return static_cast<const int64_t*>(array.data());
}

int64_t bind_submit(Reader& reader, const Input& requests, const Input& parts, const Output& out) {
  int64_t n_requests = 0, n_parts = 0;
  const int64_t* request = rows_of(requests, "requests", &n_requests);
  const int64_t* part = rows_of(parts, "parts", &n_parts);
  uint8_t* to = data_of<uint8_t>(out, "out", {kAny});
  const auto room = static_cast<int64_t>(out.shape(0));
  std::vector<ReadRequest> wanted;
  std::vector<ReadPart> pieces;
  wanted.reserve(static_cast<size_t>(n_requests));
  pieces.reserve(static_cast<size_t>(n_parts));
  int64_t next = 0;
  for (int64_t i = 0; i < n_requests; ++i, request += 3) {
    const int64_t offset = request[0], bytes = request[1], count = request[2];
    require(offset >= 0 && offset <= reader.size(), "requests", "begin beyond the file");
    require(bytes >= 0 && bytes <= reader.largest(), "requests", "are larger than the reader allows");
    require(bytes <= reader.size() - offset, "requests", "end beyond the file");
    require(count >= 0 && count <= n_parts - next, "requests", "count more parts than there are");
    for (int64_t j = next; j < next + count; ++j) {
      const int64_t at = part[3 * j], size = part[3 * j + 1], place = part[3 * j + 2];
      require(size >= 0 && size <= bytes && at >= offset && at - offset <= bytes - size, "parts",
              "lie outside their request");
      require(place >= 0 && place <= room && size <= room - place, "parts", "go beyond out");
      pieces.push_back({at, size, to + place});
    }
    next += count;
    wanted.push_back({offset, bytes, count});
  }
  require(next == n_parts, "requests", "count fewer parts than there are");
  return guarded([&] { return reader.submit(wanted, pieces); });
}

}  // namespace

void bind_reader(nb::module_& m) {
  nb::class_<Reader>(m, "Reader", "A file that is read past the page cache, with several reads in flight.")
      .def(
          "__init__",
          [](Reader* self, const std::string& path, int depth, int64_t largest, bool direct) {
            require(depth >= 1 && depth <= kMostDepth, "depth", "is not between 1 and 256");
            require(largest >= 1 && largest <= kMostBytes, "largest", "is not between 1 byte and 1 GiB");
            try {
              new (self) Reader(path, depth, largest, direct);
            } catch (const std::system_error& error) {
              raise(error);
            }
          },
          nb::arg("path"), nb::arg("depth"), nb::arg("largest"), nb::arg("direct") = true)
      .def_prop_ro("direct", &Reader::direct)
      .def_prop_ro("depth", &Reader::depth)
      .def_prop_ro("largest", &Reader::largest)
      .def_prop_ro("size", &Reader::size)
      .def("stats",
           [](Reader& self) {
             const ReadStats stats = self.stats();
             return std::make_tuple(stats.requests, stats.bytes, stats.busy);
           })
      .def("submit", &bind_submit, nb::arg("requests"), nb::arg("parts"), nb::arg("out"))
      .def(
          "wait", [](Reader& self, int64_t ticket) { guarded([&] { self.wait(ticket); }); },
          nb::arg("ticket"));
  m.def("watch_mapping", &watch_mapping, nb::arg("address"), nb::arg("nbytes"), nb::arg("words"));
  m.def("forget_mapping", &forget_mapping, nb::arg("number"));
  m.def("shelter_mapping", &shelter_mapping, nb::arg("number"), nb::arg("by"));
  m.def("lost_mapping", &lost_mapping, nb::arg("number"));
}

}  // namespace thermocline
