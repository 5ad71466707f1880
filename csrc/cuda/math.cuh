// The elementary functions of the accumulator types.
#pragma once

#include <cmath>

#include "cuda/ptx.cuh"

namespace seqkern::cuda {

// Stands for the maximum of nothing: finite, so that max - max is 0 where all of a row is -inf.
template <class Acc>
__device__ __forceinline__ constexpr Acc lowest() {
  return sizeof(Acc) == 4 ? static_cast<Acc>(-3.402823466e+38F)
                          : static_cast<Acc>(-1.7976931348623157e+308);
}

template <class Acc>
__device__ __forceinline__ constexpr Acc quiet_nan() {
  return static_cast<Acc>(__builtin_nanf(""));
}

template <class Acc>
__device__ __forceinline__ bool is_nan(Acc x) {
  return x != x;
}

// e^d as a softmax needs it (d <= 0 up to rounding). In float, one multiplication and ex2: the
// rounding of d log2(e) makes the relative error |d| 2^-24 + 2^-22, as large as that of d itself.
__device__ __forceinline__ float softmax_exp(float d) {
  return ex2_approx(d * 1.44269504088896340736f);
}
__device__ __forceinline__ double softmax_exp(double d) { return ::exp(d); }

__device__ __forceinline__ float log_of(float x) { return ::logf(x); }
__device__ __forceinline__ double log_of(double x) { return ::log(x); }
__device__ __forceinline__ float expm1_of(float x) { return ::expm1f(x); }
__device__ __forceinline__ double expm1_of(double x) { return ::expm1(x); }
__device__ __forceinline__ float tanh_of(float x) { return ::tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return ::tanh(x); }

__device__ __forceinline__ float erfc_of(float x) { return ::erfcf(x); }
__device__ __forceinline__ double erfc_of(double x) { return ::erfc(x); }
__device__ __forceinline__ float exp_of(float x) { return ::expf(x); }
__device__ __forceinline__ double exp_of(double x) { return ::exp(x); }

// Of x >= 1, which may be infinite.
__device__ __forceinline__ float reciprocal(float x) { return rcp_approx(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// Where e^-x is infinite, 0 as it should be.
template <class Acc>
__device__ __forceinline__ Acc sigmoid_of(Acc x) {
  return reciprocal(Acc(1) + exp_of(-x));
}

// 1 - tanh^2, without the subtraction that cancels where tanh is near 1.
template <class Acc>
__device__ __forceinline__ Acc tanh_derivative(Acc x) {
  const Acc e = softmax_exp(-2 * (x < 0 ? -x : x));
  const Acc s = reciprocal(1 + e);
  return 4 * e * s * s;
}

// A product that is rounded: the compiler may not fuse it with a sum that follows.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// The other operand where one is NaN: NaN is found by the sums, never by the maximum.
__device__ __forceinline__ float max_of(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double max_of(double a, double b) { return ::fmax(a, b); }

}  // namespace seqkern::cuda
