#include "dispatch.h"

#include <stdexcept>

namespace thermocline {
namespace {

struct Level {
  const Kernels* kernels;
  bool available;
};

Kernels whole(Kernels kernels, const AttendKernels& attend) {
  kernels.attend = attend;
  return kernels;
}

#ifdef THERMOCLINE_X86
Kernels with_bf16() {
  Kernels kernels = whole(kAvx512Kernels, kAvx512Attend);
  kernels.name = "avx512bf16";
  kernels.panel[kBF16] = kAvx512Bf16Kernels.panel;
  kernels.round_tokens = kAvx512Bf16Kernels.round_tokens;
  return kernels;
}
#endif

std::vector<Level> levels() {
  static const Kernels baseline = whole(kBaselineKernels, kBaselineAttend);
#ifdef THERMOCLINE_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  static const Kernels with_avx2 = whole(kAvx2Kernels, kAvx2Attend);
  static const Kernels with_avx512 = whole(kAvx512Kernels, kAvx512Attend);
  static const Kernels bf16 = with_bf16();
  return {{&baseline, true},
          {&with_avx2, avx2},
          {&with_avx512, avx512},
          {&bf16, avx512 && __builtin_cpu_supports("avx512bf16")}};
#else
  return {{&baseline, true}};
#endif
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.available) names.emplace_back(level.kernels->name);
  }
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  const Kernels* best = nullptr;
  std::string names;
  for (const Level& level : levels()) {
    if (!level.available) continue;
    if (isa == level.kernels->name) return *level.kernels;
    best = level.kernels;
    names += (names.empty() ? "" : ", ") + std::string(level.kernels->name);
  }
  if (isa == "auto") return *best;
  throw std::invalid_argument("isa is '" + isa + "'; this CPU has: " + names);
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> features;
#ifdef THERMOCLINE_X86
  __builtin_cpu_init();
#define FEATURE(name) features.emplace_back(name, __builtin_cpu_supports(name) != 0)
  FEATURE("sse4.2");
  FEATURE("avx");
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("f16c");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512vl");
  FEATURE("avx512dq");
  FEATURE("avx512vnni");
  FEATURE("avx512bf16");
#undef FEATURE
#endif
  return features;
}

}  // namespace thermocline
