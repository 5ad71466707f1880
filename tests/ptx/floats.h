// What instructions on floats mean, and comparisons and conversions of all types, as the PTX ISA
// says it.
//
// Where a GPU only approximates, results differ from the exact ones by up to what the ISA allows,
// one way or the other as a hash of the operand says (arithmetic.cpp).
#pragma once

#include <cmath>
#include <limits>

#include "emulator.h"
#include "registers.h"

namespace seqkern::emulator::ptx {

template <class T>
SEQKERN_INLINE T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? b : a;  // -0 is below 0
  }
  return a > b ? a : b;
}
template <class T>
SEQKERN_INLINE T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
SEQKERN_INLINE T max_NaN(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::bit_cast<T>(0x7fffffffu) : max(a, b);
}
// The sign of the first on the second.
template <class T>
SEQKERN_INLINE T copysign(T sign, T x) {
  return std::copysign(x, sign);
}
template <class T>
SEQKERN_INLINE T fma(T a, T b, T c) {
  if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
  return static_cast<T>(__builtin_fma(a, b, c));
}
float fma_downwards(float a, float b, float c);
template <class T>
SEQKERN_INLINE T fma_rm(T a, T b, T c) {
  return fma_downwards(a, b, c);
}
template <class T>
SEQKERN_INLINE T sqrt(T x) {
  return std::sqrt(x);
}
template <class T>
SEQKERN_INLINE T rcp(T x) {
  return 1 / x;
}

// y, off by up to 2^-`bits` of it.
float approximately(float y, uint32_t hash_of, double error);
template <class T>
SEQKERN_INLINE float flushed(T x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
float ex2(float x, bool flush);
template <class T>
SEQKERN_INLINE T ex2_approx(T x) {
  return ex2(x, false);
}
template <class T>
SEQKERN_INLINE T ex2_approx_ftz(T x) {
  return ex2(x, true);
}
float lg2(float x);
template <class T>
SEQKERN_INLINE T lg2_approx(T x) {
  return lg2(x);
}
template <class T>
SEQKERN_INLINE T lg2_approx_ftz(T x) {
  return lg2(flushed(x));
}
float reciprocal(float x);
double reciprocal(double x);
template <class T>
SEQKERN_INLINE T rcp_approx_ftz(T x) {
  return reciprocal(x);
}
float quotient(float a, float b);
template <class T>
SEQKERN_INLINE T div_approx(T a, T b) {
  return quotient(a, b);
}
template <class T>
SEQKERN_INLINE T div_full(T a, T b) {
  return quotient(a, b);
}

template <class T>
SEQKERN_INLINE bool is_eq(T a, T b) {
  return a == b;
}
template <class T>
SEQKERN_INLINE bool is_lt(T a, T b) {
  return a < b;
}
template <class T>
SEQKERN_INLINE bool is_le(T a, T b) {
  return a <= b;
}
template <class T>
SEQKERN_INLINE bool is_gt(T a, T b) {
  return a > b;
}
template <class T>
SEQKERN_INLINE bool is_ge(T a, T b) {
  return a >= b;
}
template <class T>
SEQKERN_INLINE bool is_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b);
}
// Of floats, false with a NaN; those that end in u, true.
template <class T>
SEQKERN_INLINE bool is_ne(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return a < b || a > b;
  return a != b;
}
template <class T>
SEQKERN_INLINE bool is_num(T a, T b) {
  return !is_nan(a, b);
}
template <class T>
SEQKERN_INLINE bool is_equ(T a, T b) {
  return is_nan(a, b) || a == b;
}
template <class T>
SEQKERN_INLINE bool is_neu(T a, T b) {
  return is_nan(a, b) || a != b;
}
template <class T>
SEQKERN_INLINE bool is_ltu(T a, T b) {
  return is_nan(a, b) || a < b;
}
template <class T>
SEQKERN_INLINE bool is_leu(T a, T b) {
  return is_nan(a, b) || a <= b;
}
template <class T>
SEQKERN_INLINE bool is_gtu(T a, T b) {
  return is_nan(a, b) || a > b;
}
template <class T>
SEQKERN_INLINE bool is_geu(T a, T b) {
  return is_nan(a, b) || a >= b;
}

// ---------------------------------------------------------------- conversions

template <class To, class From>
SEQKERN_INLINE To cvt(From x) {
  if constexpr (std::is_same_v<To, f16>) {
    return {float_to_half(x)};
  } else if constexpr (std::is_same_v<To, bf16>) {
    return {float_to_bfloat16(x)};
  } else if constexpr (std::is_same_v<From, f16>) {
    return half_to_float(x.bits);
  } else if constexpr (std::is_same_v<From, bf16>) {
    return bfloat16_to_float(x.bits);
  } else {
    static_assert(!std::is_floating_point_v<From> || std::is_floating_point_v<To>);
    return static_cast<To>(x);
  }
}
// Two floats, the first of them in the high half.
template <class To, class From>
SEQKERN_INLINE To cvt(From high, From low) {
  if constexpr (std::is_same_v<To, f16x2>) {
    return {static_cast<u32>(float_to_half(high)) << 16 | float_to_half(low)};
  } else {
    static_assert(std::is_same_v<To, bf16x2>);
    return {static_cast<u32>(float_to_bfloat16(high)) << 16 | float_to_bfloat16(low)};
  }
}
// To an integer, or to a float that holds one: out of range, the nearest there is; NaN is 0.
template <class To, class From>
SEQKERN_INLINE To whole(From x) {
  if constexpr (std::is_floating_point_v<To>) {
    return static_cast<To>(x);
  } else {
    if (std::isnan(x)) return 0;
    using Limits = std::numeric_limits<To>;
    if (x >= std::ldexp(From{1}, Limits::digits)) return Limits::max();
    if (x <= static_cast<From>(Limits::min())) return Limits::min();
    return static_cast<To>(x);
  }
}
template <class To, class From>
SEQKERN_INLINE To cvt_rni(From x) {
  return whole<To>(std::nearbyint(x));
}
template <class To, class From>
SEQKERN_INLINE To cvt_rzi(From x) {
  return whole<To>(std::trunc(x));
}
template <class To, class From>
SEQKERN_INLINE To cvt_rmi(From x) {
  return whole<To>(std::floor(x));
}
template <class To, class From>
SEQKERN_INLINE To cvt_rpi(From x) {
  return whole<To>(std::ceil(x));
}
template <class To, class From>
SEQKERN_INLINE To cvt_sat(From x) {
  static_assert(std::is_floating_point_v<To>);
  return x > 0 ? static_cast<To>(x > 1 ? 1 : x) : To{0};  // NaN and -0 are 0, too
}

}  // namespace seqkern::emulator::ptx
