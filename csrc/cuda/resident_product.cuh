// The product of one group of 8 hidden units with a pass of up to 32 batch rows, by one warp over
// its part of the inner dimension, in chunks whose weights are 64 bytes of each lane.
//
// Forward, the four gates of the 8 units: [32, H] times h_{t-1}. Backward, the gradient of h of the
// 8 units: W^T [8, 4 H] times dgates_t. The other operand is a row per batch row in the exchange
// (resident.cuh), padded with zeros to whole chunks. What is summed for a row does not depend on
// the other rows, nor does the order.
//
//   kChunkUnits          hidden units along the inner dimension of a chunk
//   kInputs              exchanged values of each: h, or the four dgates
//   kSumRows             batch rows that a lane has sums of at once
//   kPartials            accumulators a warp leaves in shared memory
//   position(n, unit, q) of such a value in a row of n padded units
//   weight(...)          16 of a lane's 64 bytes of a chunk, from W
//   multiply(...)        adds a chunk's products to the lane's sums, of `rows` rows from x on
//   store(...)           the lane's sums of `rows` rows from `first` on to the warp's partials
//   total(...)           of one unit and row over the warps' partials, in the order of the warps
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/resident.h"
#include "cuda/vec.cuh"

namespace seqkern::cuda {

// W [4 H, H], read as zero beyond its ends.
template <class T>
struct RecurrentWeight {
  const T* w;
  int H;

  __device__ __forceinline__ T at(int gate, int unit, int k) const {
    return unit < H && k < H ? w[(static_cast<int64_t>(gate) * H + unit) * H + k] : T{};
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
  static constexpr int kPartials = kPassRows * kUnits * kGates;
  static constexpr int kSumRows = kPassRows;
  static constexpr int kTiles = kSumRows / kTileRows;
  struct Sums {
    float tile[kTiles][2][4];  // gates i and f, g and o
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

  __device__ static __forceinline__ void multiply(Sums& sums, const uint4 (&w)[4], const T* x,
                                                  int row_elements, int, int chunk, int rows,
                                                  int lane) {
    const T* from =
        x + static_cast<int64_t>(lane / 4) * row_elements + chunk * kChunkUnits + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n * kTileRows >= rows) break;
      const uint4 h = load_bits(from + static_cast<int64_t>(n) * kTileRows * row_elements);
      float (&sum)[2][4] = sums.tile[n];
      mma_m16n8k16<T>(sum[0], {w[0].x, w[1].x, w[0].y, w[1].y}, {h.x, h.y}, sum[0]);
      mma_m16n8k16<T>(sum[1], {w[2].x, w[3].x, w[2].y, w[3].y}, {h.x, h.y}, sum[1]);
      mma_m16n8k16<T>(sum[0], {w[0].z, w[1].z, w[0].w, w[1].w}, {h.z, h.w}, sum[0]);
      mma_m16n8k16<T>(sum[1], {w[2].z, w[3].z, w[2].w, w[3].w}, {h.z, h.w}, sum[1]);
    }
  }

  // 16 bytes per unit and row. Units change places with the row's number, or the lanes that write
  // (2 units, 4 rows at a time) would meet in the same banks.
  __device__ static __forceinline__ int place(int row, int u) {
    return (row * kUnits + (u ^ (row & 6))) * kGates;
  }

  __device__ static __forceinline__ void store(const Sums& sums, float* partials, int, int rows,
                                               int lane) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n * kTileRows >= rows) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&sum)[2][4] = sums.tile[n];
        float* to = partials + place(n * kTileRows + lane % 4 * 2 + i, lane / 4);
        *reinterpret_cast<float4*>(to) =
            make_float4(sum[0][i], sum[0][2 + i], sum[1][i], sum[1][2 + i]);
      }
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
  static constexpr int kPartials = kPassRows * kUnits;
  static constexpr int kSumRows = kPassRows;
  static constexpr int kTiles = kSumRows / 16;
  struct Sums {
    float tile[kTiles][4];
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

  __device__ static __forceinline__ void multiply(Sums& sums, const uint4 (&w)[4], const T* x,
                                                  int row_elements, int, int chunk, int rows,
                                                  int lane) {
    const T* from = x + static_cast<int64_t>(lane / 4) * row_elements +
                    chunk * kChunkUnits * kGates + lane % 4 * 8;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (m * 16 >= rows) break;
      const T* low = from + static_cast<int64_t>(m) * 16 * row_elements;
      // Where the pass has no second 8 rows, the first are read again and their sums not stored.
      const T* high = m * 16 + 8 < rows ? low + int64_t{8} * row_elements : low;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 d = load_bits(low + i * 32), e = load_bits(high + i * 32);
        mma_m16n8k16<T>(sums.tile[m], {d.x, e.x, d.y, e.y}, {w[i].x, w[i].y}, sums.tile[m]);
        mma_m16n8k16<T>(sums.tile[m], {d.z, e.z, d.w, e.w}, {w[i].z, w[i].w}, sums.tile[m]);
      }
    }
  }

  __device__ static __forceinline__ void store(const Sums& sums, float* partials, int, int rows,
                                               int lane) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (m * 16 + i * 8 >= rows) break;
        float* to = partials + (m * 16 + i * 8 + lane / 4) * kUnits + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(sums.tile[m][2 * i], sums.tile[m][2 * i + 1]);
      }
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
  static constexpr int kPartials = kPassRows * kUnits * kGates;
  // Few, for the registers: weights in slots are read again for the next tile.
  static constexpr int kSumRows = kTileRows / 2;
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

  __device__ static __forceinline__ void multiply(Sums& sums, const uint4 (&w)[4], const T* x,
                                                  int row_elements, int inner_units, int chunk, int,
                                                  int lane) {
    const T* from = x + (kBackward ? lane % 4 * inner_units : 0) + chunk * kChunkUnits;
    T weight[4][kPack<T>];
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack(TypeTag<T>{}, w[i], weight[i]);
#pragma unroll
    for (int row = 0; row < kSumRows; ++row) {
      const T* x_row = from + static_cast<int64_t>(row) * row_elements;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T v[kPack<T>];
        unpack(TypeTag<T>{}, load_bits(x_row + i * kPack<T>), v);
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) sums.row[row] += weight[i][e] * v[e];
      }
    }
  }

  __device__ static __forceinline__ void store(const Sums& sums, T* partials, int first, int,
                                               int lane) {
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
