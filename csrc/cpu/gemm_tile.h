// The register tile of a matrix product: the inner loop that attention and the recurrent layers
// share.
//
// C [R, panel] += A [R, K] B [K, panel]. A is read where it is, one element at a time, with any
// strides. B is a panel: NV vectors wide (kTileVectors by default), its rows one after the other or
// b_stride apart. The accumulators are the caller's, in registers, so that an epilogue (a softmax,
// a cell's gates) costs no pass over memory.
#pragma once

#include "cpu/simd.h"

namespace seqkern::cpu::SEQKERN_ISA {

// As many accumulators as the registers hold beside one row of B and a broadcast of A: with 32
// registers 8 x 3, which needs fewer loads per product than 14 x 2; with 16, 6 x 2.
inline constexpr int kTileRows = kManyRegisters ? 8 : 6;
inline constexpr int kTileVectors = kManyRegisters ? 3 : 2;
template <class Acc>
inline constexpr int kPanel = kTileVectors * kLanes<Acc>;

template <class Acc, int R, int NV = kTileVectors>
struct Tile {
  Vec<Acc> c[R][NV];
};

// tile += A B. a: element (r, k) at a[r * row_stride + k * k_stride]; b: [K, NV vectors] of Acc or
// of a type that is converted to it.
template <class Acc, int R, int NV, class B>
SEQKERN_INLINE void multiply_add(Tile<Acc, R, NV>& tile, const Acc* a, int64_t row_stride,
                                 int64_t k_stride, const B* b, int64_t K,
                                 int64_t b_stride = NV * kLanes<Acc>) {
  // A copy the compiler can see has no other address, so it stays in registers.
  Tile<Acc, R, NV> sum = tile;
  for (int64_t k = 0; k < K; ++k) {
    Vec<Acc> b_k[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b_k[j] = load(b + k * b_stride + j * kLanes<Acc>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<Acc> a_rk = splat<Vec<Acc>>(a[r * row_stride + k * k_stride]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum.c[r][j] += a_rk * b_k[j];
    }
  }
  tile = sum;
}

// A sum is cut into chains of this many products, each added up on its own: the rounding errors of
// one long chain would grow with its length.
inline constexpr int64_t kProductChain = 256;

// out [R, NV vectors] = A B (+ out), in chains of about the same length.
template <class Acc, int R, int NV, class B>
SEQKERN_INLINE void multiply_in_chains(Acc* out, int64_t out_stride, bool add, const Acc* a,
                                       int64_t row_stride, int64_t k_stride, const B* b, int64_t K,
                                       int64_t b_stride) {
  constexpr int L = kLanes<Acc>;
  const int64_t chains = K > kProductChain ? (K + kProductChain - 1) / kProductChain : 1;
  const int64_t length = (K + chains - 1) / chains;
  int64_t k = 0;
  do {
    Tile<Acc, R, NV> tile = {};
    multiply_add(tile, a + k * k_stride, row_stride, k_stride, b + k * b_stride,
                 K - k < length ? K - k : length, b_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        Acc* to = out + r * out_stride + j * L;
        store(to, add ? load(to) + tile.c[r][j] : tile.c[r][j]);
      }
    }
    k += length;
    add = true;
  } while (k < K);
}

// Calls f(Count<R>{}) with R = rows, 1 <= rows <= kTileRows: the last rows of a block get a tile of
// their own height.
template <int R>
struct Count {
  static constexpr int value = R;
};
template <int R = kTileRows, class F>
SEQKERN_INLINE void with_tile_rows(int64_t rows, F f) {
  if constexpr (R == 1) {
    f(Count<1>{});
  } else if (rows == R) {
    f(Count<R>{});
  } else {
    with_tile_rows<R - 1>(rows, f);
  }
}

// The same for the vectors of a tile, up to NV.
template <int NV = kTileVectors, class F>
SEQKERN_INLINE void with_vectors(int64_t vectors, F f) {
  with_tile_rows<NV>(vectors, f);
}

// Packs columns [0, columns) of a matrix into a panel Acc [K, kPanel]; the rest of it is zeros.
// Element (k, column) is at source[k * k_stride + column * column_stride].
template <class Acc, class T>
SEQKERN_INLINE void pack_panel(Acc* panel, const T* source, int64_t k_stride, int64_t column_stride,
                               int64_t K, int columns) {
  if (column_stride == 1 && columns == kPanel<Acc>) {
    for (int64_t k = 0; k < K; ++k) {
      for (int j = 0; j < kTileVectors; ++j) {
        store(panel + k * kPanel<Acc> + j * kLanes<Acc>,
              load(source + k * k_stride + j * kLanes<Acc>));
      }
    }
    return;
  }
  for (int column = 0; column < columns; ++column) {
    const T* from = source + column * column_stride;
    for (int64_t k = 0; k < K; ++k) panel[k * kPanel<Acc> + column] = load1(from + k * k_stride);
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int column = columns; column < kPanel<Acc>; ++column) panel[k * kPanel<Acc> + column] = 0;
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
