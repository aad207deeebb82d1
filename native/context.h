// What the ops of one engine share: threads, kernels and scratch memory. Passed to every op, never global.
#pragma once

#include <mutex>
#include <string>

#include "arena.h"
#include "kernels.h"
#include "pool.h"

namespace thermocline {

struct Context {
  // Throws std::invalid_argument if this CPU lacks `isa`, or there is no such `fetching` (see fetching_of).
  Context(int threads, const std::string& isa, bool pin, const std::string& fetching = "auto");

  const Kernels& kernels;
  const Fetching fetching;
  Pool pool;
  Pool solo;  // the caller alone, for ops that are over before a worker could join in
  Arena arena;
  std::mutex mutex;

  // The threads for an op that touches so many bytes.
  Pool& team(int64_t bytes);

  // Streams for a team, in scratch memory.
  Streams streams(const Pool& team) { return {arena.take<Streams::Stretch>(team.size()), team.size()}; }
};

// One op: keeps other callers of the context waiting, and gives the scratch memory back at its start.
class OpScope {
 public:
  explicit OpScope(Context& context) : lock_(context.mutex) { context.arena.reset(); }

 private:
  std::lock_guard<std::mutex> lock_;
};

}  // namespace thermocline
