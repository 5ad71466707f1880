// The first lanes of a vector, where a row ends inside it. AVX-512 masks the others; lane by lane a
// load takes fifteen times as long, as each is written into a vector in memory.
#pragma once

#include "cpu/simd.h"

namespace seqkern::cpu::SEQKERN_ISA {

#if defined(__AVX512F__) && SEQKERN_VECTOR_BYTES == 64

SEQKERN_INLINE __mmask16 first_lanes(int64_t count) {  // fewer than 16
  return count > 0 ? static_cast<__mmask16>((1u << count) - 1) : __mmask16{0};
}

SEQKERN_INLINE VecF load_lanes(const float* p, __mmask16 lanes, VecF rest) {
  return (VecF)_mm512_mask_loadu_ps((__m512)rest, lanes, p);
}
SEQKERN_INLINE VecD load_lanes(const double* p, __mmask16 lanes, VecD rest) {
  return (VecD)_mm512_mask_loadu_pd((__m512d)rest, static_cast<__mmask8>(lanes), p);
}
SEQKERN_INLINE VecF load_lanes(const BFloat16* p, __mmask16 lanes, VecF rest) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  return (VecF)_mm512_mask_mov_ps((__m512)rest, lanes,
                                  _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
}
SEQKERN_INLINE VecF load_lanes(const Half* p, __mmask16 lanes, VecF rest) {
  return (VecF)_mm512_mask_mov_ps((__m512)rest, lanes,
                                  _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)));
}

SEQKERN_INLINE void store_lanes(float* p, __mmask16 lanes, VecF v) {
  _mm512_mask_storeu_ps(p, lanes, (__m512)v);
}
SEQKERN_INLINE void store_lanes(double* p, __mmask16 lanes, VecD v) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), (__m512d)v);
}
template <class T>  // BFloat16, Half
SEQKERN_INLINE void store_lanes(T* p, __mmask16 lanes, VecF v) {
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)rounded_bits(v, p));
}

#else

SEQKERN_INLINE int64_t first_lanes(int64_t count) { return count; }

template <class T, class V>
SEQKERN_INLINE V load_lanes(const T* p, int64_t lanes, V rest) {
  for (int64_t i = 0; i < lanes; ++i) rest[i] = load1(p + i);
  return rest;
}
template <class T, class V>
SEQKERN_INLINE void store_lanes(T* p, int64_t lanes, V v) {
  for (int64_t i = 0; i < lanes; ++i) store1(p + i, v[i]);
}

#endif

// `count` elements from p on, a vector at most, with `rest` in the other lanes.
template <class Acc, class T>
SEQKERN_INLINE Vec<Acc> load_part(const T* p, int64_t count, Vec<Acc> rest = Vec<Acc>{}) {
  if (count >= kLanes<Acc>) [[likely]]
    return load(p);
  return load_lanes(p, first_lanes(count), rest);
}

template <class Acc, class T>
SEQKERN_INLINE void store_part(T* p, Vec<Acc> v, int64_t count) {
  if (count >= kLanes<Acc>) [[likely]] {
    store(p, v);
  } else {
    store_lanes(p, first_lanes(count), v);
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
