// The products of resident_product.cuh in 16 bits, on the tensor cores.
//
// Which elements of the inner dimension make up a k of mma.sync is free, as long as both operands
// agree. Lane (g, t) = (lane / 4, lane % 4) takes elements [8 t, 8 t + 8) of each run of 32, so
// that every operand comes in loads of 16 bytes: words 2 j and 2 j + 1 of a load are its registers
// of the j-th mma of the run.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/resident_operands.cuh"

namespace seqkern::cuda {

// A lane uses the pieces it brought: they go to registers, so that their loads wait together.
struct MmaStage {
  static constexpr int kMostTiles = 4;
  static constexpr int kHeldChunks = 4;
  static constexpr bool kOwnPieces = true;
  using Taken = uint4[kStagePieces];

  __device__ static __forceinline__ int place(int lane, int) { return lane; }

  __device__ static __forceinline__ void take(Taken& taken, const uint4* stage, int lane) {
#pragma unroll
    for (int i = 0; i < kStagePieces; ++i) taken[i] = stage[i * kWarp + lane];
  }
};

// The weights are A: rows g and g + 8 of two tiles are the four gates of unit g, so a lane ends
// with all gates of unit g for batch rows 2 t and 2 t + 1 of each tile of 8.
template <class T>
struct MmaForward : ForwardLayout<T>, MmaStage {
  using ForwardLayout<T>::kChunkUnits;
  using ForwardLayout<T>::kPartials;
  static constexpr int kStages = 3;
  template <int kTiles>
  struct Sums {
    float gates[kTiles][2][4];  // i and f, g and o
  };

  // Operand A of mma i / 2 of the run, for gates 2 (i % 2) and the next.
  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int unit = group * kUnits + lane / 4;
    const int k = chunk * kChunkUnits + lane % 4 * 8 + i / 2 * 4;
    T x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = w.at(i % 2 * 2 + e / 2 % 2, unit, k + e / 4 * 2 + e % 2);
    return raw_bits(x);
  }

  template <int kFirst, int kPart, int kTiles>
  __device__ static __forceinline__ void multiply(Sums<kTiles>& sums, const uint4 (&w)[4],
                                                  const Taken& taken, int) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 h = taken[kFirst + tile];
      float (&sum)[2][4] = sums.gates[tile];
      mma_m16n8k16<T>(sum[0], {w[0].x, w[0].y, w[0].z, w[0].w}, {h.x, h.y}, sum[0]);
      mma_m16n8k16<T>(sum[1], {w[1].x, w[1].y, w[1].z, w[1].w}, {h.x, h.y}, sum[1]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 h = taken[kFirst + tile];
      float (&sum)[2][4] = sums.gates[tile];
      mma_m16n8k16<T>(sum[0], {w[2].x, w[2].y, w[2].z, w[2].w}, {h.z, h.w}, sum[0]);
      mma_m16n8k16<T>(sum[1], {w[3].x, w[3].y, w[3].z, w[3].w}, {h.z, h.w}, sum[1]);
    }
  }

  // 16 bytes per unit and row. Units change places with the row's number, or the lanes that write
  // (2 units, 4 rows at a time) would meet in the same banks.
  __device__ static __forceinline__ int at(int row, int u) {
    return (row * kUnits + (u ^ (row & 6))) * kGates;
  }

  template <int kTiles>
  __device__ static __forceinline__ void store(Sums<kTiles>& sums, float* partials, int first,
                                               int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&sum)[2][4] = sums.gates[tile];
        float* to = partials + at(first + tile * kTileRows + lane % 4 * 2 + i, lane / 4);
        const float gates[kGates] = {sum[0][i], sum[0][2 + i], sum[1][i], sum[1][2 + i]};
        store_shared16(to, pack(TypeTag<float>{}, gates));
      }
    }
  }

  template <int kUnroll>
  __device__ static __forceinline__ void total(const float* partials, int row, int u,
                                               float (&gates)[4]) {
#pragma unroll kUnroll
    for (int warp = 0; warp < kProductWarps; ++warp) {
      float part[4];
      load4(partials + warp * kPartials + at(row, u), part);
#pragma unroll
      for (int q = 0; q < kGates; ++q) gates[q] += part[q];
    }
  }
};

// dgates are A, two tiles of batch rows or one and zeros, and the weights of the 8 units B. Each
// part of a chunk has sums of its own, which are independent of each other until the end.
template <class T>
struct MmaBackward : BackwardLayout<T>, MmaStage {
  using BackwardLayout<T>::kChunkUnits;
  using BackwardLayout<T>::kParts;
  static constexpr int kStages = 4;
  template <int kTiles>
  struct Sums {
    float rows[(kTiles + 1) / 2][kParts][4];
  };

  // The gates of a unit side by side.
  static constexpr int kApart = 1;
  __device__ static __forceinline__ int position(int unit) { return unit * kGates; }

  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int k = group * kUnits + lane / 4;
    const int unit = chunk * kChunkUnits + i * 8 + lane % 4 * 2;
    T x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = w.at(e % kGates, unit + e / kGates, k);
    return raw_bits(x);
  }

  template <int kFirst, int kPart, int kTiles>
  __device__ static __forceinline__ void multiply(Sums<kTiles>& sums, const uint4 (&w)[4],
                                                  const Taken& taken, int) {
    static_assert(kFirst == 0);
    constexpr int kTaken = kStagePieces / kTiles;  // parts
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int part = 0; part < kTaken; ++part) {
#pragma unroll
        for (int pair = 0; pair < (kTiles + 1) / 2; ++pair) {
          const uint4 low = taken[part * kTiles + pair * 2];
          const uint4 high =
              kTiles > 1 ? taken[part * kTiles + pair * 2 + 1] : make_uint4(0, 0, 0, 0);
          const uint4 b = w[kPart + part];
          float (&sum)[4] = sums.rows[pair][kPart + part];
          if (half == 0) {
            mma_m16n8k16<T>(sum, {low.x, high.x, low.y, high.y}, {b.x, b.y}, sum);
          } else {
            mma_m16n8k16<T>(sum, {low.z, high.z, low.w, high.w}, {b.z, b.w}, sum);
          }
        }
      }
    }
  }

  template <int kTiles>
  __device__ static __forceinline__ void store(Sums<kTiles>& sums, float* partials, int first,
                                               int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto sum = [&](int i) {
        const float (&parts)[kParts][4] = sums.rows[tile / 2];
        const int n = tile % 2 * 2 + i;
        return (parts[0][n] + parts[1][n]) + (parts[2][n] + parts[3][n]);
      };
      float* to = partials + (first + tile * kTileRows + lane / 4) * kUnits + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum(0), sum(1));
    }
  }
};

}  // namespace seqkern::cuda
