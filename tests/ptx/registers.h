// Registers of PTX hold bits; instructions say what type the bits are of.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace seqkern::emulator::ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using f64 = double;
using pred = bool;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
struct f16x2 {
  u32 bits;
};
struct bf16x2 {
  u32 bits;
};

// Where a result goes that nobody wants.
struct Nothing {};
inline Nothing nothing;

template <size_t kBytes>
using UnsignedOf = std::conditional_t<
    kBytes == 1, u8,
    std::conditional_t<kBytes == 2, u16, std::conditional_t<kBytes == 4, u32, u64>>>;

#define SEQKERN_INLINE __attribute__((always_inline)) inline

// The value of type T in a register's low bits.
template <class T, class Bits>
SEQKERN_INLINE T as(Bits x) {
  if constexpr (std::is_same_v<T, bool>) {
    return x != 0;
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(x);
  } else {
    return std::bit_cast<T>(static_cast<UnsignedOf<sizeof(T)>>(x));
  }
}

// A register wider than the value holds its sign in the rest, where it has one.
template <class Register, class T>
SEQKERN_INLINE void put(Register& r, T x) {
  if constexpr (std::is_same_v<Register, Nothing>) {
  } else if constexpr (std::is_same_v<Register, bool>) {
    r = x != 0;
  } else if constexpr (std::is_signed_v<T> && std::is_integral_v<T>) {
    r = static_cast<Register>(static_cast<s64>(x));
  } else if constexpr (std::is_integral_v<T>) {
    r = static_cast<Register>(x);
  } else {
    r = static_cast<Register>(std::bit_cast<UnsignedOf<sizeof(T)>>(x));
  }
}

// Vectors of registers in one: the first in the low bits.
template <class T, class First, class... Rest>
SEQKERN_INLINE T pack(First first, Rest... rest) {
  constexpr unsigned kBits = 8 * sizeof(T) / (1 + sizeof...(Rest));
  using Part = UnsignedOf<kBits / 8>;
  u64 whole = static_cast<Part>(first);
  unsigned at = 0;
  ((whole |= static_cast<u64>(static_cast<Part>(rest)) << (at += kBits)), ...);
  return as<T>(whole);
}
template <class T, class... Registers>
SEQKERN_INLINE void unpack(T x, Registers&... into) {
  constexpr unsigned kBits = 8 * sizeof(T) / sizeof...(Registers);
  const u64 whole = std::bit_cast<UnsignedOf<sizeof(T)>>(x);
  unsigned at = 0;
  ((put(into, static_cast<UnsignedOf<kBits / 8>>(whole >> at)), at += kBits), ...);
}

}  // namespace seqkern::emulator::ptx
