#include "arrays.h"

namespace nb = nanobind;

namespace thermocline {
namespace {

std::string shape_text(size_t ndim, const int64_t* shape) {
  std::string text = "(";
  for (size_t i = 0; i < ndim; ++i) {
    text += (i ? ", " : "") + (shape[i] == kAny ? std::string("any") : std::to_string(shape[i]));
  }
  return text + ")";
}

bool contiguous(size_t ndim, const int64_t* shape, const int64_t* strides) {
  for (size_t i = 0; i < ndim; ++i) {
    if (shape[i] == 0) return true;
  }
  int64_t expected = 1;
  for (size_t i = ndim; i-- > 0;) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

const char* name_of(detail::Element element) {
  switch (element) {
    case detail::Element::kFloat32:
      return "float32";
    case detail::Element::kFloat16:
      return "float16";
    case detail::Element::kInt32:
      return "int32";
    default:
      return "uint8";
  }
}

[[noreturn]] void fail(const char* name, const std::string& message) {
  throw nb::value_error((std::string(name) + " " + message).c_str());
}

}  // namespace

void require(bool ok, const char* name, const char* message) {
  if (!ok) fail(name, message);
}

namespace detail {

bool is_type(const nb::dlpack::dtype& type, Element element) {
  using Code = nb::dlpack::dtype_code;
  if (type.lanes != 1) return false;
  const auto code = static_cast<Code>(type.code);
  switch (element) {
    case Element::kFloat32:
      return code == Code::Float && type.bits == 32;
    case Element::kFloat16:
      return code == Code::Float && type.bits == 16;
    case Element::kInt32:
      return code == Code::Int && type.bits == 32;
    default:
      return code == Code::UInt && type.bits == 8;
  }
}

void check(const char* name, const nb::dlpack::dtype& type, Element element, size_t ndim,
           const int64_t* shape, const int64_t* strides, std::initializer_list<int64_t> expected) {
  if (!is_type(type, element)) fail(name, std::string("is not ") + name_of(element));
  bool fits = ndim == expected.size();
  for (size_t i = 0; fits && i < ndim; ++i) {
    const int64_t wanted = expected.begin()[i];
    fits = wanted == kAny || wanted == shape[i];
  }
  if (!fits) {
    fail(name, "has shape " + shape_text(ndim, shape) + ", expected " +
                   shape_text(expected.size(), expected.begin()));
  }
  if (!contiguous(ndim, shape, strides)) fail(name, "is not C-contiguous");
}

}  // namespace detail

MatrixHandle::MatrixHandle(Input data, int ggml_type, int64_t rows, int64_t cols) : owner(std::move(data)) {
  const Format format = format_of(ggml_type);
  const int64_t bytes = row_bytes(format, cols);
  matrix = {data_of<uint8_t>(owner, "data", {rows, bytes}), format, rows, cols, bytes};
}

const LargestScales* MatrixHandle::largest() const {
  if (largest_.empty()) {
    const int64_t minima = has_minima(matrix.format) ? matrix.rows : 0;
    largest_.assign(static_cast<size_t>(matrix.rows + minima), -1.0f);
    largest_scales_ = {largest_.data(), largest_.data() + matrix.rows};
  }
  return &largest_scales_;
}

}  // namespace thermocline
