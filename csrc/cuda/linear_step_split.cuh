// A normalised row of x as the matrix units take it, in three bfloat16 numbers of each element, and
// where such rows lie when they are made before.
#pragma once

#include "cuda/linear_step_rows.cuh"

namespace seqkern::cuda {

inline constexpr int kPackInputs = 8;  // of 16 bits, in 16 bytes

// Of prepared rows, in the workspace [3, N, width]: inputs of a part of a row, zeros beyond K.
__host__ __device__ __forceinline__ int64_t prepared_width(int64_t K) {
  return ceil_div<int64_t>(K, kPackInputs) * kPackInputs;
}

// v as the sum of three bfloat16 numbers: the upper half of its bits, of the rest's, and what is
// left. What is not finite stays what it is.
__device__ __forceinline__ void split(float v, float (&parts)[3]) {
  const bool finite = ::fabsf(v) < __builtin_inff();
  const auto upper = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); };
  parts[0] = finite ? upper(v) : v;
  const float rest = finite ? v - parts[0] : 0.0f;
  parts[1] = upper(rest);
  parts[2] = rest - parts[1];
}

// Inputs [k, k + 8) of a row, normalised and split, zeros beyond K.
template <class T, class W>
__device__ __forceinline__ void split_pack(const T* x, bool aligned, float mean, float scale,
                                           const float (&w)[kPackInputs],
                                           const float (&b)[kPackInputs], int k, int K,
                                           uint4 (&parts)[3]) {
  float v[3][kPackInputs];
  const T* of_x[1] = {x};
#pragma unroll
  for (int p = 0; p < kPackInputs; p += kPack<T>) {
    uint4 bits[1][1];
    load_packs(of_x, aligned, k + p, 0, K, bits);
    float y[kPack<T>];
    unpack(TypeTag<T>{}, bits[0][0], y);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const float z = normalised(y[i], mean, scale, w[p + i], b[p + i]);
      float of_z[3];
      split(k + p + i < K ? z : 0.0f, of_z);
#pragma unroll
      for (int part = 0; part < 3; ++part) v[part][p + i] = of_z[part];
    }
  }
#pragma unroll
  for (int part = 0; part < 3; ++part) parts[part] = pack(TypeTag<W>{}, v[part]);
}

}  // namespace seqkern::cuda
