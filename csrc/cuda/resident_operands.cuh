// The operands of the products of resident_product.cuh, as they lie in memory.
#pragma once

#include "cuda/block.cuh"
#include "cuda/resident.h"
#include "cuda/vec.cuh"

namespace seqkern::cuda {

// W [gates H, H], read as zero beyond its ends.
template <class T>
struct RecurrentWeight {
  const T* w;
  int H;
  int gates;

  __device__ __forceinline__ T at(int gate, int unit, int k) const {
    return gate < gates && unit < H && k < H ? w[(static_cast<int64_t>(gate) * H + unit) * H + k]
                                             : T{};
  }
};

// Elements as they are, in 16 bytes.
template <class T>
__device__ __forceinline__ uint4 raw_bits(const T (&x)[kPack<T>]) {
  if constexpr (sizeof(T) == 2) {
    const auto pair = [&](int i) {
      return x[2 * i].bits | static_cast<uint32_t>(x[2 * i + 1].bits) << 16;
    };
    return make_uint4(pair(0), pair(1), pair(2), pair(3));
  } else {
    return pack(TypeTag<T>{}, x);
  }
}

__device__ __forceinline__ void load4(const float* p, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x;
  x[1] = v.y;
  x[2] = v.z;
  x[3] = v.w;
}
__device__ __forceinline__ void load4(const double* p, double (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = p[i];
}

// ---------------------------------------------------------------- layouts

template <class T>
struct ForwardLayout {
  using Element = T;
  using Acc = AccOf<T>;
  static constexpr int kChunkUnits = 4 * kPack<T>;
  static constexpr int kInputs = 1;
  static constexpr int kApart = 1;
  static constexpr int kParts = 1;
  static constexpr int kPartials = kPassRows * kUnits * kGates;

  __device__ static __forceinline__ int position(int unit) { return unit; }
};

template <class T>
struct BackwardLayout {
  using Element = T;
  using Acc = AccOf<T>;
  static constexpr int kChunkUnits = 4 * kPack<T>;
  static constexpr int kInputs = kGates;
  static constexpr int kParts = 4;
  static constexpr int kPartials = kPassRows * kUnits;

  template <int>
  __device__ static __forceinline__ Acc total(const Acc* partials, int row, int u) {
    Acc sum = 0;
#pragma unroll
    for (int warp = 0; warp < kProductWarps; ++warp) {
      sum += partials[warp * kPartials + row * kUnits + u];
    }
    return sum;
  }
};

}  // namespace seqkern::cuda
