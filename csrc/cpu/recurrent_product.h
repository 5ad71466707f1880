// Products of a few rows with a weight matrix packed once per call: the work of a recurrent step.
#pragma once

#include "cpu/gemm_tile.h"

namespace seqkern::cpu::SEQKERN_ISA {

// to[k * row + i] = from[k * k_stride + i * i_stride] for k < K and lanes i < count; zeros in the
// other lanes of the vector.
template <class Acc, class T>
SEQKERN_INLINE void pack_lanes(Acc* to, int64_t row, const T* from, int64_t k_stride,
                               int64_t i_stride, int64_t K, int64_t count) {
  constexpr int L = kLanes<Acc>;
  int64_t k = 0;
  if (i_stride == 1 && count == L) {
    for (; k < K; ++k) store(to + k * row, load(from + k * k_stride));
  }
  // Lines along k, as many at a time as fill a square.
  for (; k_stride == 1 && k + L <= K; k += L) {
    Vec<Acc> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = i < count ? load(from + i * i_stride + k) : Vec<Acc>{};
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(to + (k + i) * row, square[i]);
  }
  for (; k < K; ++k) {
    Vec<Acc> lanes = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = load1(from + k * k_stride + i * i_stride);
    store(to + k * row, lanes);
  }
}

// A weight matrix as tiles read it: B [K, units] for each of G gates. Units are divided into blocks
// of `width` vectors or one fewer, which are the items that threads share. A block is contiguous:
// with few rows all gates of a unit lie together, [K, G width], so that the tile has accumulators
// enough to hide the latency of an FMA; with many rows each gate is a panel [K, width] of its own.
template <class Acc>
struct PackedMatrix {
  Acc* data;
  const Acc* in_place = nullptr;  // [K, units] to be read where it is, instead of data
  int64_t K;
  int64_t units;
  int64_t vectors;  // ceil(units / lanes)
  int64_t blocks;
  int64_t width;
  int G;
  bool together;

  SEQKERN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // For products with up to `rows` rows, in blocks for `members` threads.
  PackedMatrix(int64_t K, int64_t units, int G, int64_t rows, int64_t members)
      : data(nullptr), K(K), units(units), vectors(ceil_div(units, kLanes<Acc>)), G(G) {
    constexpr bool kWide = kVectorBytes == 64;  // 32 registers
    together = G > 1 && rows <= (kWide ? 4 : 2);
    int64_t most;
    if (together) {
      most = rows <= (kWide ? 2 : 1) ? 2 : 1;
    } else if (G == 1 && rows <= 4) {
      most = (kWide ? 24 : 12) / rows < 8 ? (kWide ? 24 : 12) / rows : 8;
    } else {
      most = kWide || rows <= 4 ? 3 : 2;
    }
    blocks = ceil_div(ceil_div(vectors, most), members) * members;
    if (blocks > vectors) blocks = vectors;
    width = ceil_div(vectors, blocks);
  }

  int64_t size() const { return vectors * kLanes<Acc> * G * K; }  // elements
  int64_t first_vector(int64_t block) const { return vectors * block / blocks; }
  int64_t width_of(int64_t block) const { return first_vector(block + 1) - first_vector(block); }
  const Acc* block_data(int64_t block) const {
    return in_place ? in_place + first_unit(block)
                    : data + first_vector(block) * kLanes<Acc> * G * K;
  }
  // Few rows read a matrix once, which is no more than packing it reads, if whole vectors of units
  // lie side by side.
  template <class T>
  void read_in_place(const void* source, int64_t rows) {
    if constexpr (sizeof(T) == sizeof(Acc)) {
      if (G == 1 && rows <= 4 && units % kLanes<Acc> == 0) {
        in_place = static_cast<const Acc*>(source);
      }
    }
  }
  int64_t first_unit(int64_t block) const { return first_vector(block) * kLanes<Acc>; }
  int64_t units_of(int64_t block) const {
    const int64_t first = first_unit(block), all = width_of(block) * kLanes<Acc>;
    return units - first < all ? units - first : all;
  }

  // Element (k, gate, unit) of the matrix is source[k * k_stride + (gate * units + unit) *
  // u_stride].
  template <class T>
  void pack(int64_t block, const T* source, int64_t k_stride, int64_t u_stride) const;

  // Asks for what packing a gate of a block will read, of a source with k_stride 1: into
  // second-level cache, since the first has no room beside a product.
  template <class T>
  void fetch(int64_t block, int64_t gate, const T* source, int64_t u_stride) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* from = source + (gate * units + first_unit(block)) * u_stride;
    for (int64_t i = 0; i < units_of(block) * u_stride; i += kLine) {
      __builtin_prefetch(from + i, 0, 2);
    }
  }
};

// Most rows of a block of rows, whose products an epilogue then finds in first-level cache.
inline constexpr int64_t kRowBlock = 16;
inline constexpr int64_t kMostVectors = 12;  // of a block, all gates together
template <class Acc>
inline constexpr int64_t kProductSize = kRowBlock * kMostVectors * kLanes<Acc>;

// out [rows, G, width lanes of the block] = a [rows, K] B, out_stride from one row to the next.
void product(const PackedMatrix<float>& b, int64_t block, const float* a, int64_t row_stride,
             int64_t rows, float* out, int64_t out_stride);
void product(const PackedMatrix<double>& b, int64_t block, const double* a, int64_t row_stride,
             int64_t rows, double* out, int64_t out_stride);

template <class Acc>
template <class T>
void PackedMatrix<Acc>::pack(int64_t block, const T* source, int64_t k_stride,
                             int64_t u_stride) const {
  constexpr int L = kLanes<Acc>;
  if (in_place) return;
  const int64_t w = width_of(block), first = first_unit(block);
  const int64_t row = together ? G * w * L : w * L;  // elements between k and k + 1
  for (int gate = 0; gate < G; ++gate) {
    Acc* panel = data + first * G * K + (together ? gate * w * L : gate * w * L * K);
    for (int64_t v = 0; v < w; ++v) {
      const int64_t u = first + v * L;
      const int64_t count = units - u < L ? units - u : L;
      const T* from = source + (gate * units + u) * u_stride;
      pack_lanes<Acc>(panel + v * L, row, from, k_stride, u_stride, K, count);
    }
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
