// Checked access to the arrays that Python hands over. Shapes and types are our own side's business, so that
// what is wrong is a ValueError with the argument's name.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "matrix.h"

namespace thermocline {

using Input = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;
using Output = nanobind::ndarray<nanobind::device::cpu>;

constexpr int64_t kAny = -1;

// Throws nanobind::value_error with `message` unless `ok`.
void require(bool ok, const char* name, const char* message);

namespace detail {

enum class Element { kFloat32, kFloat16, kInt32, kUint8 };

template <class T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, float>) return Element::kFloat32;
  if constexpr (std::is_same_v<T, int32_t>) return Element::kInt32;
  if constexpr (std::is_same_v<T, uint8_t>) return Element::kUint8;
}

bool is_type(const nanobind::dlpack::dtype& type, Element element);
void check(const char* name, const nanobind::dlpack::dtype& type, Element element, size_t ndim,
           const int64_t* shape, const int64_t* strides, std::initializer_list<int64_t> expected);

}  // namespace detail

// The data of a C-contiguous array of T and this shape (kAny: any length).
template <class T, class Array>
auto* data_of(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
  detail::check(name, array.dtype(), detail::element_of<T>(), array.ndim(), array.shape_ptr(),
                array.stride_ptr(), shape);
  if constexpr (std::is_same_v<Array, Input>) {
    return static_cast<const T*>(array.data());
  } else {
    return static_cast<T*>(array.data());
  }
}

// An element of a tuple as the array that it must be.
template <class Array>
Array array_of(nanobind::handle object, const char* name) {
  Array array;
  if (!nanobind::try_cast(object, array)) {
    require(false, name,
            std::is_same_v<Array, Output> ? "holds what is no writable array" : "holds what is no array");
  }
  return array;
}

// A matrix with the array that owns its bytes.
struct MatrixHandle {
  MatrixHandle(Input data, int ggml_type, int64_t rows, int64_t cols);

  // What is known of the scales of its rows; made at the first call.
  const LargestScales* largest() const;

  Input owner;
  Matrix matrix;

 private:
  mutable std::vector<float> largest_;
  mutable LargestScales largest_scales_{};
};

}  // namespace thermocline
