#pragma once

#include <nanobind/nanobind.h>

namespace thermocline {

void bind_reader(nanobind::module_& m);

}  // namespace thermocline
