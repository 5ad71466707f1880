// Vectors of the instruction set this file is compiled for, and the functions kernels need on them.
//
// Built on the compiler's vector extensions, so the same text serves SSE2, AVX2, AVX-512 and NEON;
// an intrinsic stands only where the extension has no exact equivalent that compiles to one
// instruction. Everything lives in the namespace of the ISA: an inline function with external
// linkage compiled for AVX-512 must never be the copy the linker keeps for everyone.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#if !defined(SEQKERN_ISA) || !defined(SEQKERN_VECTOR_BYTES)
#error "ISA sources are compiled with SEQKERN_ISA and SEQKERN_VECTOR_BYTES (CMakeLists.txt)"
#endif

#define SEQKERN_INLINE static inline __attribute__((always_inline))

namespace seqkern::cpu::SEQKERN_ISA {

inline constexpr int kVectorBytes = SEQKERN_VECTOR_BYTES;

// Registers for vectors: 32, or 16.
#if defined(__aarch64__)
inline constexpr bool kManyRegisters = true;
#else
inline constexpr bool kManyRegisters = kVectorBytes == 64;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <class Acc>
struct VecTraits;
template <>
struct VecTraits<float> {
  using V = VecF;
  using I = VecI32;
  using U = VecU32;
};
template <>
struct VecTraits<double> {
  using V = VecD;
  using I = VecI64;
  using U = VecU64;
};
template <class Acc>
using Vec = typename VecTraits<Acc>::V;
template <class Acc>
inline constexpr int kLanes = kVectorBytes / sizeof(Acc);

// ---------------------------------------------------------------- load, store, broadcast

// x - 0 is x whatever its sign, so the subtraction vanishes; 0 + x would be an instruction, since
// it turns -0 into 0.
template <class V>
SEQKERN_INLINE V splat(decltype(V{}[0] + 0) x) {
  return x - V{};
}

template <class To, class From>
SEQKERN_INLINE To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// Lane n is the i_n-th of a's lanes and b's after them.
template <int... i, class V>
SEQKERN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, i...);
#else
  using Lane =
      std::conditional_t<sizeof(V) == 2 * sizeof...(i), uint16_t,
                         std::conditional_t<sizeof(V) == 4 * sizeof...(i), uint32_t, uint64_t>>;
  typedef Lane Lanes __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Lanes{i...});
#endif
}

SEQKERN_INLINE float half_to_float(uint16_t h) {
  // Shift exponent and mantissa into place, then multiply by 2^112 to rebias: exact, and subnormals
  // normalise themselves. Infinity and NaN (exponent 31) need the all-ones exponent put back.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f = bitcast<float>(magnitude) * 0x1p112f;
  uint32_t u = bitcast<uint32_t>(f);
  if ((h & 0x7c00u) == 0x7c00u) u |= 0x7f800000u;
  return bitcast<float>(u | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

SEQKERN_INLINE uint16_t float_to_half(float f) {
  const uint32_t u = bitcast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa so that the addition rounds to nearest even.
    const float aligned = bitcast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bitcast<uint32_t>(aligned) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return sign | static_cast<uint16_t>(rounded >> 13);
}

SEQKERN_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

SEQKERN_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// With zeros above. Of a conversion to a whole vector the compiler (g++ 12) makes two and three
// shuffles.
SEQKERN_INLINE VecU32 widened(HalfBits h) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  return (VecU32)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__) && SEQKERN_VECTOR_BYTES == 32
  return (VecU32)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU32);
#endif
}

typedef float HalfVecF __attribute__((vector_size(kVectorBytes / 2)));

SEQKERN_INLINE VecD in_double(HalfVecF v) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  return (VecD)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__) && SEQKERN_VECTOR_BYTES == 32
  return (VecD)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, VecD);
#endif
}

SEQKERN_INLINE VecF load(const BFloat16* p) {
  HalfBits h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bitcast<VecF>(widened(h) << 16);
}

SEQKERN_INLINE VecF load(const Half* p) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && SEQKERN_VECTOR_BYTES == 32
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (VecF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  VecF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

SEQKERN_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
SEQKERN_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof(v)); }

// v's lanes as what the pointer is to, rounded to nearest even.
SEQKERN_INLINE HalfBits rounded_bits(VecF v, const BFloat16*) {
  // A NaN keeps its upper bits and gets the quiet bit, so it stays a NaN.
  const VecU32 u = bitcast<VecU32>(v);
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU32 quiet = (u >> 16) | 0x40u;
  const VecI32 is_nan = v != v;
  return __builtin_convertvector((rounded & ~(VecU32)is_nan) | (quiet & (VecU32)is_nan), HalfBits);
}

SEQKERN_INLINE HalfBits rounded_bits(VecF v, const Half*) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && SEQKERN_VECTOR_BYTES == 32
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (HalfBits)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
#else
  HalfBits bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = float_to_half(v[i]);
  return bits;
#endif
}

SEQKERN_INLINE void store(BFloat16* p, VecF v) {
  const HalfBits bits = rounded_bits(v, p);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
SEQKERN_INLINE void store(Half* p, VecF v) {
  const HalfBits bits = rounded_bits(v, p);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

SEQKERN_INLINE float load1(const float* p) { return *p; }
SEQKERN_INLINE double load1(const double* p) { return *p; }
SEQKERN_INLINE float load1(const Half* p) { return half_to_float(p->bits); }
SEQKERN_INLINE float load1(const BFloat16* p) {
  return bitcast<float>(static_cast<uint32_t>(p->bits) << 16);
}

SEQKERN_INLINE void store1(float* p, float x) { *p = x; }
SEQKERN_INLINE void store1(double* p, double x) { *p = x; }
SEQKERN_INLINE void store1(Half* p, float x) { p->bits = float_to_half(x); }
SEQKERN_INLINE void store1(BFloat16* p, float x) {
  const uint32_t u = bitcast<uint32_t>(x);
  p->bits =
      static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// v, made in a register before it is used. g++ reads a value from memory again for each product
// that it is in; and of a product that reaches a sum by way of a condition it makes one instruction
// with the sum, rounded once, in some copies of a loop and not in others, where a row's bits must
// not depend on which copy it meets.
template <class V>
SEQKERN_INLINE V in_register(V v) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__SSE2__) && SEQKERN_VECTOR_BYTES <= 32
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// ---------------------------------------------------------------- selection and reduction

template <class V, class I>
SEQKERN_INLINE V select(I mask, V a, V b) {  // mask lanes are all ones or all zeros
  return bitcast<V>((mask & bitcast<I>(a)) | (~mask & bitcast<I>(b)));
}

// b where either is NaN, as the x86 instruction: NaN is found by the sums, never by the maximum.
SEQKERN_INLINE VecF vmax(VecF a, VecF b) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && SEQKERN_VECTOR_BYTES == 32
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__) && SEQKERN_VECTOR_BYTES == 16
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}

SEQKERN_INLINE VecD vmax(VecD a, VecD b) {
#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64
  return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__) && SEQKERN_VECTOR_BYTES == 32
  return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__) && SEQKERN_VECTOR_BYTES == 16
  return (VecD)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return select(a > b, a, b);
#endif
}

// The two halves of a vector, down to the 16 bytes that every ISA has.
template <class T, int kBytes>
struct Halves {
  typedef T Half __attribute__((vector_size(kBytes / 2)));
  Half low, high;
};

// Reductions fold halves onto each other: pairwise, so that the rounding of a sum is the same
// however the compiler unrolls, and few instructions, since a row of 16 logits is two vectors.
template <class V, class F>
SEQKERN_INLINE auto fold(V v, F combine) {
  using T = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (sizeof(V) > 16) {
    const auto halves = bitcast<Halves<T, sizeof(V)>>(v);
    return fold(typename Halves<T, sizeof(V)>::Half(combine(halves.low, halves.high)), combine);
  } else if constexpr (sizeof(T) == 8) {
    return combine(v[0], v[1]);
  } else {
    return combine(combine(v[0], v[2]), combine(v[1], v[3]));
  }
}

template <class V>
SEQKERN_INLINE auto hmax(V v) {
  return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

template <class V>
SEQKERN_INLINE auto hsum(V v) {
  return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// ---------------------------------------------------------------- as many vectors as lanes

template <int... kIndices>
struct Indices {};
template <int n, int... kIndices>
struct CountUp : CountUp<n - 1, n - 1, kIndices...> {};
template <int... kIndices>
struct CountUp<0, kIndices...> {
  using type = Indices<kIndices...>;
};
template <class V>
using LanesOf = typename CountUp<sizeof(V) / sizeof(V{}[0])>::type;

// The lower (or upper) halves of all blocks of 2 w lanes of a and b: a's first, b's first, a's
// second and so on.
template <int w, bool kUpper, class V, int... i>
SEQKERN_INLINE V halves_of_blocks(V a, V b, Indices<i...>) {
  constexpr int n = sizeof...(i);
  return shuffle<(i / w % 2 * n + i / (2 * w) * 2 * w + i % w + (kUpper ? w : 0))...>(a, b);
}

// Lane i is hsum(v[i]), bit for bit; v is used up.
template <class V, int n = sizeof(V) / sizeof(V{}[0])>
SEQKERN_INLINE V hsums(V* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    constexpr int w = n / 2;
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) {
      v[i] = halves_of_blocks<w, false>(v[i], v[i + w], LanesOf<V>{}) +
             halves_of_blocks<w, true>(v[i], v[i + w], LanesOf<V>{});
    }
    return hsums<V, w>(v);
  }
}

// b's lanes in place of a's (kUpper: the other way round) wherever the blocks of w lanes that they
// would have to come from, or go to, lie off the diagonal.
template <int w, bool kUpper, class V, int... i>
SEQKERN_INLINE V exchange_blocks(V a, V b, Indices<i...>) {
  constexpr int n = sizeof...(i);
  return shuffle<((i & w) == 0 ? i + (kUpper ? w : 0) : n + i - (kUpper ? 0 : w))...>(a, b);
}

// Lane j of v[i] for lane i of v[j].
template <class V, int w = sizeof(V) / sizeof(V{}[0]) / 2>
SEQKERN_INLINE void transpose(V* v) {
  constexpr int n = sizeof(V) / sizeof(V{}[0]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & w) continue;
    const V a = v[i], b = v[i + w];
    v[i] = exchange_blocks<w, false>(a, b, LanesOf<V>{});
    v[i + w] = exchange_blocks<w, true>(a, b, LanesOf<V>{});
  }
  if constexpr (w > 1) transpose<V, w / 2>(v);
}

// Each lane the largest of the lanes i, i + kStep, i + 2 kStep ...
template <int kStep, class V, size_t... kI>
SEQKERN_INLINE V max_every(V v, std::index_sequence<kI...> lanes) {
  constexpr int kN = sizeof...(kI);
  if constexpr (kStep < kN) {
    v = max_every<2 * kStep>(v, lanes);
    v = vmax(shuffle<static_cast<int>(kI ^ kStep)...>(v, v), v);
  }
  return v;
}
template <int kStep, class V>
SEQKERN_INLINE V max_every(V v) {
  return max_every<kStep>(v, std::make_index_sequence<sizeof(V) / sizeof(V{}[0])>{});
}

}  // namespace seqkern::cpu::SEQKERN_ISA
