#include "dispatch.h"

#include <stdexcept>

#ifdef THERMOCLINE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

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
Kernels with_vnni() {
  Kernels kernels = whole(kAvx2Kernels, kAvx2Attend);
  kernels.name = "avxvnni";
  for (int f = 0; f < kFormats; ++f) {
    if (!is_integer(static_cast<Format>(f))) continue;
    kernels.dot[f] = kAvxVnniKernels.dot[f];
    kernels.panel[f] = kAvxVnniKernels.panel[f];
    kernels.add_sums[f] = kAvxVnniKernels.add_sums[f];
    kernels.finish_sums[f] = kAvxVnniKernels.finish_sums[f];
  }
  return kernels;
}

Kernels with_bf16() {
  Kernels kernels = whole(kAvx512Kernels, kAvx512Attend);
  kernels.name = "avx512bf16";
  kernels.panel[kBF16] = kAvx512Bf16Kernels.panel;
  kernels.round_tokens = kAvx512Bf16Kernels.round_tokens;
  return kernels;
}

Kernels with_amx() {
  Kernels kernels = with_bf16();
  kernels.name = "amx";
  for (int f = 0; f < kFormats; ++f) {
    if (!kAmxKernels.panel[f].dot) continue;
    kernels.panel[f] = kAmxKernels.panel[f];
    kernels.pack_across[f] = kAmxKernels.pack_across[f];
  }
  kernels.pair_tokens = kAmxKernels.pair_tokens;
  kernels.split_tokens = kAmxKernels.split_tokens;
  kernels.split = kAmxKernels.split;
  kernels.turn_tiles = kAmxKernels.turn_tiles;
  return kernels;
}

struct AmxFeatures {
  bool tile, bf16, int8;
};

AmxFeatures amx_features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  return {(d >> 24 & 1) != 0, (d >> 22 & 1) != 0, (d >> 25 & 1) != 0};
}

// Whether the system lets this process use tiles, for which it must be asked once.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
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
  static const Kernels vnni = with_vnni();
  static const Kernels bf16 = with_bf16();
  static const Kernels amx = with_amx();
  const bool has_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const AmxFeatures tiles = amx_features();
  const bool has_amx = has_bf16 && tiles.tile && tiles.bf16 && tiles.int8 && may_use_tiles();
  return {{&baseline, true},      {&with_avx2, avx2}, {&vnni, avx2 && __builtin_cpu_supports("avxvnni")},
          {&with_avx512, avx512}, {&bf16, has_bf16},  {&amx, has_amx}};
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

// Measured on AMD's Zen 4, which has AVX-512, and Zen 3, and on Intel's server processors with AMX.
Fetching fetching_of(const std::string& name) {
  if (name == "first") return kToFirst;
  if (name == "second") return kToSecond;
  if (name != "auto") throw std::invalid_argument("fetching is '" + name + "'; allowed: auto, first, second");
#ifdef THERMOCLINE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f")) return kToSecond;
#endif
  return kToFirst;
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
  FEATURE("avxvnni");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512vl");
  FEATURE("avx512dq");
  FEATURE("avx512vnni");
  FEATURE("avx512bf16");
#undef FEATURE
  const AmxFeatures tiles = amx_features();
  features.emplace_back("amx_tile", tiles.tile);
  features.emplace_back("amx_bf16", tiles.bf16);
  features.emplace_back("amx_int8", tiles.int8);
#endif
  return features;
}

}  // namespace thermocline
