// Stands in for CUDA's header in the emulator: the conversions seqkern uses.
#pragma once

#include <cstdint>

#include "emulator.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return seqkern::emulator::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {seqkern::emulator::float_to_half(x)}; }
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
