// Stands in for CUDA's header in the emulator: the conversions seqkern uses.
#pragma once

#include <cstdint>

#include "emulator.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) {
  return seqkern::emulator::bfloat16_to_float(x.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {seqkern::emulator::float_to_bfloat16(x)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
