// What instructions on integers and bits mean, as the PTX ISA says it.
#pragma once

#include "registers.h"

namespace seqkern::emulator::ptx {

template <class T>
SEQKERN_INLINE T add(T a, T b) {
  return a + b;
}
template <class T>
SEQKERN_INLINE T sub(T a, T b) {
  return a - b;
}
template <class T>
SEQKERN_INLINE T mul(T a, T b) {
  return a * b;
}
template <class T>
SEQKERN_INLINE T mul_lo(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}
template <class T>
using Wider = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, s32, u32>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T>
SEQKERN_INLINE auto mul_wide(T a, T b) {
  return static_cast<Wider<T>>(static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b));
}
template <class T>
SEQKERN_INLINE T mul_hi(T a, T b) {
  return static_cast<T>((static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b)) >> (8 * sizeof(T)));
}
template <class T>
SEQKERN_INLINE T mad_lo(T a, T b, T c) {
  return static_cast<T>(mul_lo(a, b) + c);
}
template <class T>
SEQKERN_INLINE auto mad_wide(T a, T b, Wider<T> c) {
  return static_cast<Wider<T>>(mul_wide(a, b) + c);
}
template <class T>
SEQKERN_INLINE T div(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return a / b;
  } else {
    if (b == 0) return static_cast<T>(-1);  // unspecified, but no fault
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    }
    return static_cast<T>(a / b);
  }
}
template <class T>
SEQKERN_INLINE T rem(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return static_cast<T>(a % b);
}
template <class T>
SEQKERN_INLINE T neg(T x) {
  return -x;
}
template <class T>
SEQKERN_INLINE T abs(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fabs(x);
  } else {
    return x < 0 ? -x : x;
  }
}
template <class T>
SEQKERN_INLINE T and_(T a, T b) {
  return a & b;
}
template <class T>
SEQKERN_INLINE T or_(T a, T b) {
  return a | b;
}
template <class T>
SEQKERN_INLINE T xor_(T a, T b) {
  return a ^ b;
}
template <class T>
SEQKERN_INLINE T not_(T x) {
  if constexpr (std::is_same_v<T, bool>) {
    return !x;
  } else {
    return static_cast<T>(~x);
  }
}
template <class T>
SEQKERN_INLINE T shl(T x, u32 by) {
  return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(x << by);
}
template <class T>
SEQKERN_INLINE T shr(T x, u32 by) {
  constexpr u32 kBits = 8 * sizeof(T);
  if (by >= kBits) return std::is_signed_v<T> && x < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(x >> by);
}
template <class T>
SEQKERN_INLINE T shf_l_wrap(T low, T high, u32 by) {
  return by % 32 == 0 ? high : high << by % 32 | low >> (32 - by % 32);
}
template <class T>
SEQKERN_INLINE T shf_r_wrap(T low, T high, u32 by) {
  return by % 32 == 0 ? low : high << (32 - by % 32) | low >> by % 32;
}
template <class T>
SEQKERN_INLINE T bfi(T x, T into, u32 at, u32 count) {
  at &= 0xff;
  count &= 0xff;
  constexpr u32 kBits = 8 * sizeof(T);
  const T ones = count >= kBits ? static_cast<T>(-1) : static_cast<T>((T{1} << count) - 1);
  const T mask = shl<T>(ones, at);
  return (shl<T>(x, at) & mask) | (into & ~mask);
}
template <class T>
SEQKERN_INLINE T brev(T x) {
  T y = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) y |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
  return y;
}
template <class T>
SEQKERN_INLINE u32 popc(T x) {
  return static_cast<u32>(std::popcount(x));
}
template <class T>
SEQKERN_INLINE u32 clz(T x) {
  return static_cast<u32>(std::countl_zero(x));
}
// How far left the highest bit that is not the sign's can go.
template <class T>
SEQKERN_INLINE u32 bfind_shiftamt(T x) {
  using U = std::make_unsigned_t<T>;
  const U bits = std::is_signed_v<T> && x < 0 ? static_cast<U>(~x) : static_cast<U>(x);
  return bits == 0 ? 0xffffffffu : static_cast<u32>(std::countl_zero(bits));
}
template <class T>
SEQKERN_INLINE T prmt(T a, T b, T which) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 y = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const u32 selector = which >> (4 * i) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (selector & 7))) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    y |= byte << (8 * i);
  }
  return y;
}

}  // namespace seqkern::emulator::ptx
