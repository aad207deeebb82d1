#define THERMOCLINE_ISA avx512_level
#define THERMOCLINE_INT_DOT "dot_quads.inl"
#define THERMOCLINE_SUMS "sums.inl"
#define THERMOCLINE_PANELS
#include "simd_avx512.h"
//
#include "kernels.inl"

namespace thermocline {
namespace THERMOCLINE_ISA {

static void quad_tokens(const int8_t* q, const float* d, const int16_t* sums, int64_t count, QuadToken* out) {
  for (int64_t i = 0; i < count; ++i, q += kQuadColumns, d += 4, sums += 8, ++out) {
    for (int b = 0; b < 4; ++b) {
      memcpy(out->first + 16 * b, q + kBlock * b, 16);
      memcpy(out->second + 16 * b, q + kBlock * b + 16, 16);
      const int first = sums[2 * b], second = sums[2 * b + 1];
      for (int r = 0; r < 4; ++r) {
        out->d[4 * b + r] = d[b];
        out->sums[4 * b + r] = d[b] * static_cast<float>(first + second);
        out->minus[4 * b + r] = r == 0 ? -first : r == 1 ? -second : 0;
      }
    }
  }
}

}  // namespace THERMOCLINE_ISA

constexpr Kernels kAvx512Kernels = [] {
  Kernels kernels = THERMOCLINE_ISA::make_kernels("avx512");
  kernels.quad_tokens = THERMOCLINE_ISA::quad_tokens;
  return kernels;
}();

}  // namespace thermocline
