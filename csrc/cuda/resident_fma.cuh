// The products of resident_product.cuh in 32 and 64 bits: FMA.
#pragma once

#include "cuda/resident_operands.cuh"

namespace seqkern::cuda {

// Of the sums over kLanes neighbouring lanes, lane l gets that of x[l % kLanes]: half of what is
// left goes to the other half of the lanes, and so on. Both partners add the same two numbers.
template <int kLanes, class T, int kCount>
__device__ __forceinline__ T scatter_sums(T (&x)[kCount], int lane) {
  if constexpr (kLanes == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kLanes / 2;
    const bool upper = (lane & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T own = upper ? x[i + kHalf] : x[i], other = upper ? x[i] : x[i + kHalf];
      x[i] = own + __shfl_xor_sync(kAllLanes, other, kHalf);
    }
    return scatter_sums<kHalf>(x, lane);
  }
}

// A lane has four outputs' weights for 16 bytes of the inner dimension, so that 16 bytes of a row,
// once read from shared memory, go into four times as many multiplications.
template <class T>
struct FmaStage {
  static constexpr int kMostTiles = 1;  // for the registers
  static constexpr int kHeldChunks = sizeof(T) == 8 ? 2 : 4;
  static constexpr bool kOwnPieces = false;
  using Taken = const uint4*;
  template <int kTiles>
  struct Sums {
    T rows[kTileRows][4];
  };

  __device__ static __forceinline__ void take(Taken& taken, const uint4* stage, int) {
    taken = stage;
  }

  // piece(row): of the row, where it has 16 bytes of the lane.
  template <class Piece>
  __device__ static __forceinline__ void add(Sums<1>& sums, const uint4 (&w)[4], Piece&& piece) {
    T weight[4][kPack<T>];
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack(TypeTag<T>{}, w[i], weight[i]);
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      T v[kPack<T>];
      unpack(TypeTag<T>{}, piece(row), v);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.rows[row][i] += weight[i][e] * v[e];
      }
    }
  }
};

// Lane (u, t) = (lane / 4, lane % 4) has the gates of unit u for piece t of a part.
template <class T>
struct FmaForward : ForwardLayout<T>, FmaStage<T> {
  using ForwardLayout<T>::kChunkUnits;
  using ForwardLayout<T>::kPartials;
  using typename FmaStage<T>::Taken;
  using Sums1 = typename FmaStage<T>::template Sums<1>;
  static constexpr int kStages = sizeof(T) == 8 ? 2 : 3;  // double's partials take more

  __device__ static __forceinline__ int place(int lane, int) { return lane; }

  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int unit = group * kUnits + lane / 4;
    const int k = chunk * kChunkUnits + lane % 4 * kPack<T>;
    T x[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) x[e] = w.at(i, unit, k + e);
    return raw_bits(x);
  }

  template <int kFirst, int kPart>
  __device__ static __forceinline__ void multiply(Sums1& sums, const uint4 (&w)[4],
                                                  const Taken& taken, int lane) {
    FmaStage<T>::add(sums, w, [&](int row) { return taken[kFirst * kWarp + row * 4 + lane % 4]; });
  }

  __device__ static __forceinline__ void store(Sums1& sums, T* partials, int first, int lane) {
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      partials[(first + row) * kUnits * kGates + lane] = scatter_sums<4>(sums.rows[row], lane);
    }
  }

  template <int kUnroll>
  __device__ static __forceinline__ void total(const T* partials, int row, int u, T (&gates)[4]) {
#pragma unroll kUnroll
    for (int warp = 0; warp < kProductWarps; ++warp) {
      T part[4];
      load4(partials + warp * kPartials + (row * kUnits + u) * kGates, part);
#pragma unroll
      for (int q = 0; q < kGates; ++q) gates[q] += part[q];
    }
  }
};

// Lane (s, t) = (lane / 16, lane % 16) has units 4 s to 4 s + 3 for piece t of a chunk: piece t % 4
// of part t / 4.
template <class T>
struct FmaBackward : BackwardLayout<T>, FmaStage<T> {
  using BackwardLayout<T>::kChunkUnits;
  using typename FmaStage<T>::Taken;
  using Sums1 = typename FmaStage<T>::template Sums<1>;
  static constexpr int kStages = 4;

  // A part of a chunk is a gate.
  static constexpr int kApart = kChunkUnits;
  __device__ static __forceinline__ int position(int unit) {
    return unit / kChunkUnits * kGates * kChunkUnits + unit % kChunkUnits;
  }

  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int own = group * kUnits + lane / 16 * 4 + i, q = lane % 16 / 4;
    const int inner = chunk * kChunkUnits + lane % 4 * kPack<T>;
    T x[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) x[e] = w.at(q, inner + e, own);
    return raw_bits(x);
  }

  // Odd parts have neighbouring rows change places, or the lanes, which read the same row of all
  // parts, would meet in half of the banks.
  __device__ static __forceinline__ int place(int lane, int part) { return lane ^ (part & 1) * 4; }

  template <int kFirst, int kPart>
  __device__ static __forceinline__ void multiply(Sums1& sums, const uint4 (&w)[4],
                                                  const Taken& taken, int lane) {
    static_assert(kFirst == 0 && kPart == 0);
    const int part = lane % 16 / 4;
    const uint4* pieces = taken + part * kWarp;
    FmaStage<T>::add(sums, w, [&](int row) { return pieces[place(row * 4 + lane % 4, part)]; });
  }

  // Four rows at a time: lane l gets unit l / 4 of row l % 4.
  __device__ static __forceinline__ void store(Sums1& sums, T* partials, int first, int lane) {
#pragma unroll
    for (int four = 0; four < kTileRows; four += 4) {
      T x[16];
#pragma unroll
      for (int n = 0; n < 16; ++n) x[n] = sums.rows[four + n % 4][n / 4];
      partials[(first + four + lane % 4) * kUnits + lane / 4] = scatter_sums<16>(x, lane);
    }
  }
};

}  // namespace seqkern::cuda
