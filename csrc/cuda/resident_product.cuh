// The product of one group of 8 hidden units with a pass of up to 32 batch rows, by one warp over
// its part of the inner dimension, in chunks whose weights are 64 bytes of each lane.
//
// Forward, the four gates of the 8 units: [32, H] times h_{t-1}. Backward, the gradient of h of the
// 8 units: W^T [8, 4 H] times dgates_t. The other operand is a row per batch row in the exchange
// (resident.cuh), padded with zeros to whole chunks. What is summed for a row does not depend on
// the other rows, nor does the order.
//
//   kChunkUnits   hidden units along the inner dimension of a chunk
//   kInputs       exchanged values of each: h, or the four dgates
//   kParts        of a chunk, which come one after the other
//   kSumRows      batch rows of a part; a lane has sums of so many at once
//   kStageBytes   of a part's rows of the exchange, brought to shared memory before they are used
//   kStages       such places per warp: all but one are under way while one is used
//   kOwnPieces    a lane uses of them only what it brought itself
//   kPartials     accumulators a warp leaves in shared memory
//   position(n, unit, q)   of an exchanged value in a row of n padded units
//   weight(...)    16 of a lane's 64 bytes of a chunk, from W
//   bring(...)     starts the copy of a part's rows, where `rows` of the pass are left
//   multiply(...)  adds a part's products to the lane's sums
//   store(...)     the lane's sums of the rows from `first` on to the warp's partials
//   total(...)     of one unit and row over the warps' partials, in the order of the warps
#pragma once

#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
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

// ---------------------------------------------------------------- 16 bits: tensor cores

// Which elements of the inner dimension make up a k of mma.sync is free, as long as both operands
// agree. Lane (g, t) = (lane / 4, lane % 4) takes elements [8 t, 8 t + 8) of each run of 32, so
// that every operand comes in loads of 16 bytes: words 2 j and 2 j + 1 of a load are its registers
// of the j-th mma of the run.

// The weights are A: rows g and g + 8 of two tiles are the four gates of unit g, so a lane ends
// with all gates of unit g for batch rows 2 t and 2 t + 1 of each tile of 8.
template <class T>
struct MmaForward {
  using Element = T;
  using Acc = float;
  static constexpr int kChunkUnits = 32;
  static constexpr int kInputs = 1;
  static constexpr int kParts = 1;
  static constexpr int kSumRows = 8;
  static constexpr int kStageBytes = 512;
  static constexpr int kStages = 8;
  static constexpr bool kOwnPieces = true;
  static constexpr int kPartials = kPassRows * kUnits * kGates;
  struct Sums {
    float gates[2][4];  // i and f, g and o
  };

  __device__ static __forceinline__ int position(int, int unit, int) { return unit; }

  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int unit = group * kUnits + lane / 4;
    const int k = chunk * kChunkUnits + lane % 4 * 8;
    T x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = w.at(i, unit, k + e);
    return raw_bits(x);
  }

  __device__ static __forceinline__ void bring(uint4* stage, const T* x, int row_elements, int,
                                               int chunk, int, int, int lane) {
    cp_async<16>(stage + lane, x + static_cast<int64_t>(lane / 4) * row_elements +
                                   chunk * kChunkUnits + lane % 4 * 8);
  }

  template <int kPart>
  __device__ static __forceinline__ void multiply(Sums& sums, const uint4 (&w)[4],
                                                  const uint4* stage, int lane) {
    const uint4 h = stage[lane];
    mma_m16n8k16<T>(sums.gates[0], {w[0].x, w[1].x, w[0].y, w[1].y}, {h.x, h.y}, sums.gates[0]);
    mma_m16n8k16<T>(sums.gates[1], {w[2].x, w[3].x, w[2].y, w[3].y}, {h.x, h.y}, sums.gates[1]);
    mma_m16n8k16<T>(sums.gates[0], {w[0].z, w[1].z, w[0].w, w[1].w}, {h.z, h.w}, sums.gates[0]);
    mma_m16n8k16<T>(sums.gates[1], {w[2].z, w[3].z, w[2].w, w[3].w}, {h.z, h.w}, sums.gates[1]);
  }

  // 16 bytes per unit and row. Units change places with the row's number, or the lanes that write
  // (2 units, 4 rows at a time) would meet in the same banks.
  __device__ static __forceinline__ int place(int row, int u) {
    return (row * kUnits + (u ^ (row & 6))) * kGates;
  }

  __device__ static __forceinline__ void store(const Sums& sums, float* partials, int first,
                                               int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float (&sum)[2][4] = sums.gates;
      float* to = partials + place(first + lane % 4 * 2 + i, lane / 4);
      *reinterpret_cast<float4*>(to) =
          make_float4(sum[0][i], sum[0][2 + i], sum[1][i], sum[1][2 + i]);
    }
  }

  __device__ static __forceinline__ void total(const float* partials, int warps, int row, int u,
                                               float (&gates)[4]) {
    for (int warp = 0; warp < warps; ++warp) {
      float part[4];
      load4(partials + warp * kPartials + place(row, u), part);
#pragma unroll
      for (int q = 0; q < kGates; ++q) gates[q] += part[q];
    }
  }
};

// dgates are A, 16 batch rows of them, and the weights of the 8 units B.
template <class T>
struct MmaBackward {
  using Element = T;
  using Acc = float;
  static constexpr int kChunkUnits = 32;
  static constexpr int kInputs = kGates;
  static constexpr int kParts = 4;
  static constexpr int kSumRows = 16;
  static constexpr int kStageBytes = 1024;
  static constexpr int kStages = 8;
  static constexpr bool kOwnPieces = true;
  static constexpr int kPartials = kPassRows * kUnits;
  struct Sums {
    float rows[4];
  };

  // The gates of a unit side by side.
  __device__ static __forceinline__ int position(int, int unit, int q) { return unit * kGates + q; }

  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int k = group * kUnits + lane / 4;
    const int unit = chunk * kChunkUnits + i * 8 + lane % 4 * 2;
    T x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = w.at(e % kGates, unit + e / kGates, k);
    return raw_bits(x);
  }

  __device__ static __forceinline__ void bring(uint4* stage, const T* x, int row_elements, int,
                                               int chunk, int part, int rows, int lane) {
    const T* from = x + static_cast<int64_t>(lane / 4) * row_elements +
                    (chunk * kParts + part) * 32 + lane % 4 * 8;
    cp_async<16>(stage + lane, from);
    // Where there are no second 8 rows, the first again; nobody reads their sums.
    cp_async<16>(stage + 32 + lane, from + (rows > 8 ? int64_t{8} * row_elements : 0));
  }

  template <int kPart>
  __device__ static __forceinline__ void multiply(Sums& sums, const uint4 (&w)[4],
                                                  const uint4* stage, int lane) {
    const uint4 low = stage[lane], high = stage[32 + lane];
    mma_m16n8k16<T>(sums.rows, {low.x, high.x, low.y, high.y}, {w[kPart].x, w[kPart].y}, sums.rows);
    mma_m16n8k16<T>(sums.rows, {low.z, high.z, low.w, high.w}, {w[kPart].z, w[kPart].w}, sums.rows);
  }

  __device__ static __forceinline__ void store(const Sums& sums, float* partials, int first,
                                               int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* to = partials + (first + i * 8 + lane / 4) * kUnits + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sums.rows[2 * i], sums.rows[2 * i + 1]);
    }
  }

  __device__ static __forceinline__ float total(const float* partials, int warps, int row, int u) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += partials[warp * kPartials + row * kUnits + u];
    return sum;
  }
};

// ---------------------------------------------------------------- 32 and 64 bits: FMA

// Lane 4 u + q has the weights of gate q of unit u: forward its row of W against h, which all lanes
// read from the same address; backward its column of gate q against dgates of gate q.
template <class T, bool kBackward>
struct FmaProduct {
  using Element = T;
  using Acc = T;
  static constexpr int kChunkUnits = 4 * kPack<T>;
  static constexpr int kInputs = kBackward ? kGates : 1;
  static constexpr int kParts = 1;
  static constexpr int kSumRows = 4;  // few, for the registers
  static constexpr int kStageBytes = kSumRows * kInputs * 64;
  static constexpr int kStages = kBackward ? 8 : 16;
  static constexpr bool kOwnPieces = false;
  static constexpr int kPartials = kPassRows * kUnits * kGates;
  struct Sums {
    T row[kSumRows];
  };

  // A gate's units side by side.
  __device__ static __forceinline__ int position(int inner_units, int unit, int q) {
    return q * inner_units + unit;
  }

  __device__ static __forceinline__ uint4 weight(const RecurrentWeight<T>& w, int group, int chunk,
                                                 int i, int lane) {
    const int own = group * kUnits + lane / 4, q = lane % 4;
    const int inner = chunk * kChunkUnits + i * kPack<T>;
    T x[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      x[e] = kBackward ? w.at(q, inner + e, own) : w.at(q, own, inner + e);
    }
    return raw_bits(x);
  }

  // Of a stage: 16 bytes of a row and gate. The gates' pieces are side by side, or the lanes, which
  // read those of four gates at once, would meet in the same banks.
  __device__ static __forceinline__ int piece(int row, int i, int q) {
    return (row * 4 + i) * kInputs + q;
  }

  __device__ static __forceinline__ void bring(uint4* stage, const T* x, int row_elements,
                                               int inner_units, int chunk, int, int, int lane) {
#pragma unroll
    for (int n = lane; n < kStageBytes / 16; n += kWarp) {
      const int i = n % 4, q = n / 4 % kInputs, row = n / 4 / kInputs;
      cp_async<16>(stage + piece(row, i, q), x + static_cast<int64_t>(row) * row_elements +
                                                 q * inner_units + chunk * kChunkUnits +
                                                 i * kPack<T>);
    }
  }

  template <int kPart>
  __device__ static __forceinline__ void multiply(Sums& sums, const uint4 (&w)[4],
                                                  const uint4* stage, int lane) {
    const int q = kBackward ? lane % 4 : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T weight[kPack<T>];
      unpack(TypeTag<T>{}, w[i], weight);
#pragma unroll
      for (int row = 0; row < kSumRows; ++row) {
        T v[kPack<T>];
        unpack(TypeTag<T>{}, stage[piece(row, i, q)], v);
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) sums.row[row] += weight[e] * v[e];
      }
    }
  }

  __device__ static __forceinline__ void store(const Sums& sums, T* partials, int first, int lane) {
#pragma unroll
    for (int row = 0; row < kSumRows; ++row) {
      partials[(first + row) * kUnits * kGates + lane] = sums.row[row];
    }
  }

  __device__ static __forceinline__ void total(const T* partials, int warps, int row, int u,
                                               T (&gates)[4]) {
    for (int warp = 0; warp < warps; ++warp) {
      T part[4];
      load4(partials + warp * kPartials + (row * kUnits + u) * kGates, part);
#pragma unroll
      for (int q = 0; q < kGates; ++q) gates[q] += part[q];
    }
  }
  __device__ static __forceinline__ T total(const T* partials, int warps, int row, int u) {
    T gates[4] = {};
    total(partials, warps, row, u, gates);
    return (gates[0] + gates[1]) + (gates[2] + gates[3]);
  }
};

// ---------------------------------------------------------------- choice

template <class T>
using ForwardProduct =
    std::conditional_t<sizeof(T) == 2, MmaForward<T>, FmaProduct<T, /*kBackward=*/false>>;
template <class T>
using BackwardProduct =
    std::conditional_t<sizeof(T) == 2, MmaBackward<T>, FmaProduct<T, /*kBackward=*/true>>;

}  // namespace seqkern::cuda
