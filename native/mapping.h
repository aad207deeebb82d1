// Mapped files that become shorter, or whose disk fails, while they are in use. A process that reads what is
// gone gets SIGBUS and dies. Here it says why; or, where somebody looks afterwards whether anything was lost,
// reads zeros.
#pragma once

#include <cstdint>
#include <string>

namespace thermocline {

// Watches `bytes` at `address`, which must stay mapped until forget_mapping. `words` are said to standard
// error before the process dies. The number of the mapping is for the other functions; -1: too many are
// watched, this one is not.
int watch_mapping(uintptr_t address, int64_t bytes, const std::string& words);

// The mapping may be gone from now on.
void forget_mapping(int number);

// While `by` adds up to more than 0, what is gone reads as zeros from where it was missed on, for good.
void shelter_mapping(int number, int by);

// Whether zeros were read.
bool lost_mapping(int number);

}  // namespace thermocline
