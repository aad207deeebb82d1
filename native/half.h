// IEEE half precision in plain integer and float arithmetic, for CPUs without conversion instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace thermocline {

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// A normal half becomes a float by moving its exponent and mantissa into place and multiplying by 2^-112,
// the difference of the biases; a subnormal one by counting its mantissa in steps from 0.5.
static inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7FFF);
  const float normal = float_of_bits((rest << 13) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = float_of_bits(rest | (126u << 23)) - 0.5f;
  const uint32_t magnitude = bits_of_float(rest < 0x0400 ? subnormal : normal);
  return float_of_bits(sign | magnitude);
}

// Rounds to nearest, ties to even, by letting a float addition at the right magnitude do the rounding.
static inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                              // subnormal half or zero
    const uint32_t shifted = bits_of_float(float_of_bits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - (126u << 23)));
  }
  const uint32_t rounded = magnitude + 0x0FFF + ((magnitude >> 13) & 1) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

static inline uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

static inline float load_f32(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

static inline float load_half(const uint8_t* p) { return float_of_half(load_u16(p)); }

static inline float load_bfloat(const uint8_t* p) {
  return float_of_bits(static_cast<uint32_t>(load_u16(p)) << 16);
}

static inline void store_u16(uint8_t* p, uint16_t value) { std::memcpy(p, &value, sizeof value); }

}  // namespace thermocline
