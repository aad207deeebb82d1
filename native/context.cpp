#include "context.h"

#include "dispatch.h"

namespace thermocline {
namespace {

// A dispatch with its end costs one to two microseconds, in which one core reads this much from its caches.
constexpr int64_t kWorthSharing = 32 * 1024;

}  // namespace

Context::Context(int threads, const std::string& isa, bool pin, const std::string& fetching)
    : kernels(kernels_for(isa)), fetching(fetching_of(fetching)), pool(threads, pin), solo(1, false) {}

Pool& Context::team(int64_t bytes) { return bytes < kWorthSharing ? solo : pool; }

}  // namespace thermocline
