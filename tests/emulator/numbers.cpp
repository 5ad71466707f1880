// The 16-bit floats as the hardware converts them.
#include <cstdint>
#include <limits>

#include "cuda_runtime.h"

namespace seqkern::emulator {

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31)
    return mantissa ? std::nanf("") : sign * std::numeric_limits<float>::infinity();
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude == 0) return sign;                  // frexp gives it no exponent to go by
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway to the next power rounds to infinity
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // The distance of neighbouring halves there; below 2^-14 it stays that of the subnormals.
  const int step = std::max(exponent - 11, -24);
  const auto steps = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, -step)));
  // A number of steps of 1024 or more carries into the exponent field by itself.
  return sign | static_cast<uint16_t>(steps + ((step + 24) << 10));
}

float bfloat16_to_float(uint16_t bits) { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto bits = bits_of<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace seqkern::emulator
