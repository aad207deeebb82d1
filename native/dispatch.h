// Which kernels can this CPU run?
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace thermocline {

// Names of the levels that this CPU has, weakest first; "baseline" is always there.
std::vector<std::string> isa_levels();

// The kernels of a level, or for "auto" of the best one that rounds no block formats. Throws
// std::invalid_argument naming the levels that there are.
const Kernels& kernels_for(const std::string& isa);

// "first", "second", or for "auto" what is faster on this CPU. Throws std::invalid_argument for any other.
Fetching fetching_of(const std::string& name);

// Instruction set extensions that matter here, and whether this CPU (and its system) has them.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace thermocline
