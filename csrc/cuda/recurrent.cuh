// What the kernels of the recurrent layers share: where a row's steps are, and activations.
#pragma once

#include <string>

#include "cuda/block.cuh"
#include "cuda/math.cuh"
#include "cuda/vec.cuh"
#include "ops/recurrent.h"

namespace seqkern::cuda {

// The host cannot look at lengths without waiting for the device, so they are limited here.
__device__ __forceinline__ int64_t length_of(const RecurrentInputs& r, int64_t b) {
  if (!r.lengths) return r.T;
  const int64_t L = r.lengths[b];
  return L < 0 ? 0 : L > r.T ? r.T : L;
}

// The time of step s < L.
__device__ __forceinline__ int64_t time_of(const RecurrentInputs& r, int64_t L, int64_t s) {
  return r.reverse ? L - 1 - s : s;
}

// Element i of a tensor that may be absent.
template <class T>
__device__ __forceinline__ AccOf<T> load_or_zero(const void* p, int64_t i) {
  return p ? load1(static_cast<const T*>(p) + i) : AccOf<T>(0);
}

template <class T>
__device__ __forceinline__ void store_at(void* p, int64_t i, AccOf<T> x) {
  store1(static_cast<T*>(p) + i, x);
}

// x as a reader of stored values has it.
template <class T>
__device__ __forceinline__ AccOf<T> rounded(AccOf<T> x) {
  T stored;
  store1(&stored, x);
  return load1(&stored);
}

// Loads whose results are first used where their values are asked for: a conversion beside a load
// would make the thread wait for it.
template <class T>
struct Loaded {
  T stored = {};

  // Of a tensor that may be absent: zero.
  __device__ __forceinline__ void load(const void* p, int64_t i) {
    if (p) stored = static_cast<const T*>(p)[i];
  }
  __device__ __forceinline__ AccOf<T> value() const { return load1(&stored); }
};

struct Add {
  template <class Acc>
  __device__ __forceinline__ Acc operator()(Acc a, Acc b) const {
    return a + b;
  }
};

// Calls f(TypeTag<T>, "<name of the dtype>") for every element type: the resource table.
template <class F>
void for_each_float_type(F&& f) {
  f(TypeTag<float>{}, std::string("float32"));
  f(TypeTag<double>{}, std::string("float64"));
  f(TypeTag<Half>{}, std::string("float16"));
  f(TypeTag<BFloat16>{}, std::string("bfloat16"));
}

}  // namespace seqkern::cuda
