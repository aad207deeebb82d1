// What the files of the Python face share.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "arrays.h"
#include "ffn.h"

namespace thermocline {

// A block of neurons from checked matrices; see FfnBlock. Throws nanobind::value_error naming what does not
// fit.
FfnBlock block_of(const MatrixHandle* gate, const MatrixHandle& up, const MatrixHandle& down, bool records,
                  int activation, bool both, float threshold, const std::optional<Input>& up_bias,
                  const std::optional<Input>& rows);

void bind_tape(nanobind::module_& m);

void bind_handover(nanobind::module_& m);

}  // namespace thermocline
