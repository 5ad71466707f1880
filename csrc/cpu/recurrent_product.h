// Products of a few rows with a weight matrix packed once per call: the work of a recurrent step.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/packing.h"

namespace seqkern::cpu::SEQKERN_ISA {

// Elements from one row of scratch to the next: whole vectors, and a cache line more, so that rows
// of 4 KB do not all fall into the same sets of the cache.
template <class Acc>
SEQKERN_INLINE int64_t padded(int64_t n) {
  return (n + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc> + 64 / static_cast<int64_t>(sizeof(Acc));
}

// How many parts of a T products with `rows` rows have, if tiles make them; 0: vectors of floats
// do. The rows are those of the whole call: what a thread gets of them must not decide. The matrix
// unit takes bf16 for any number of them: its weights are half as long as those of floats, which
// counts where one row reads them all (LSTM, one row of 512 units: 14 us a step for 67).
template <class T>
SEQKERN_INLINE int tile_parts(int64_t rows, int64_t K) {
  constexpr int64_t kFewestRows = kMatrixUnit && kParts<T> == 1 ? 1 : 5, kLeastDepth = 16;
  return kHasTiles && rows >= kFewestRows && K >= kLeastDepth ? kParts<T> : 0;
}

// A weight matrix as tiles read it: B [K, units] for each of G gates. Units are divided into blocks
// of `width` vectors or one fewer, which are the items that threads share. A block is contiguous:
// with few rows all gates of a unit lie together, [K, G width], so that the tile has accumulators
// enough to hide the latency of an FMA; with many rows each gate is a panel [K, width] of its own.
//
// For the matrix unit (matrix_tiles.h) a panel is [depths, parts, width] tiles, a tile's row two
// numbers k and k + 1 of each of 16 units, and the other side of the product is in parts, too:
// `put` writes it.
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
  int parts;  // of the matrix unit's numbers, 0 for vectors of Acc
  bool together;

  SEQKERN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Vectors of B whose products with `rows` elements of A stay in registers, beside them: AVX-512
  // reads the elements from memory as it multiplies, others have them in one more register.
  SEQKERN_INLINE int64_t vectors_for(int64_t rows) {
    if (!kManyRegisters) return 12 / rows;
    return (kVectorBytes == 64 ? 32 : 31) / (rows + 1);
  }

  // For products with up to `rows` rows, in blocks for `members` threads.
  PackedMatrix(int64_t K, int64_t units, int G, int64_t rows, int64_t members, int parts = 0)
      : data(nullptr),
        K(K),
        units(units),
        vectors(ceil_div(units, kLanes<Acc>)),
        G(G),
        parts(parts) {
    together = G > 1 && rows <= (kManyRegisters ? 4 : 2) && !parts;
    int64_t most;
    if (parts) {
      most = kColumnTiles;
    } else if (together) {
      most = rows <= (kManyRegisters ? 2 : 1) ? 2 : 1;
    } else if (G == 1 && rows <= 4) {
      most = vectors_for(rows) < 8 ? vectors_for(rows) : 8;
    } else {
      most = kManyRegisters || rows <= 4 ? 3 : 2;
    }
    blocks = ceil_div(ceil_div(vectors, most), members) * members;
    if (blocks > vectors) blocks = vectors;
    width = ceil_div(vectors, blocks);
  }

  // Elements of Acc that a vector of units takes.
  int64_t vector_size() const {
    if (!parts) return kLanes<Acc> * K;
    return tile_depths(K) * parts * kTileNumbers * 2 / static_cast<int64_t>(sizeof(Acc));
  }
  int64_t size() const { return vectors * G * vector_size(); }
  int64_t first_vector(int64_t block) const { return vectors * block / blocks; }
  int64_t width_of(int64_t block) const { return first_vector(block + 1) - first_vector(block); }
  const Acc* block_data(int64_t block) const {
    return in_place ? in_place + first_unit(block) : data + first_vector(block) * G * vector_size();
  }
  // Few rows read a matrix once, which is no more than packing it reads, if whole vectors of units
  // lie side by side.
  template <class T>
  void read_in_place(const void* source, int64_t rows) {
    if constexpr (sizeof(T) == sizeof(Acc)) {
      if (G == 1 && rows <= 4 && !parts && units % kLanes<Acc> == 0) {
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

  // Panels of a block, and the most that one of them takes.
  int panels() const { return together ? 1 : G; }
  int64_t panel_size() const { return (together ? G : 1) * width * vector_size(); }

  // A panel of a block as a matrix of its own, with its data at `at`; null: where they are.
  PackedMatrix panel_of(int64_t block, int panel, Acc* at) const {
    PackedMatrix one = *this;
    if (!together) one.G = 1;
    if (!at) at = data + (first_vector(block) * G + panel * width_of(block)) * vector_size();
    one.data = at - first_vector(block) * one.G * vector_size();
    return one;
  }

  // The left side of a product: rows of K elements, left_row() of Acc apart, written by `put` after
  // `clear`, which leaves zeros.
  int64_t left_row() const {
    if (!parts) return padded<Acc>(K);
    constexpr int64_t kLine = 64;
    return (parts * part_stride() * 2 + kLine) / static_cast<int64_t>(sizeof(Acc));
  }
  int64_t part_stride() const { return tile_depths(K) * kTileDepth; }  // numbers
  void clear(Acc* row) const { __builtin_memset(row, 0, left_row() * sizeof(Acc)); }
  SEQKERN_INLINE uint16_t* numbers(Acc* row) { return reinterpret_cast<uint16_t*>(row); }
  __attribute__((always_inline)) void put(Acc* row, int64_t k, Vec<Acc> v, int64_t count) const {
    if constexpr (kHasTiles && sizeof(Acc) == 4) {
      if (parts) return store_parts(numbers(row) + k, part_stride(), parts, v, count);
    }
    store_part<Acc>(row + k, v, count);
  }
  __attribute__((always_inline)) Vec<Acc> get(const Acc* row, int64_t k) const {
    if constexpr (kHasTiles && sizeof(Acc) == 4) {
      if (parts) return load_parts(numbers(const_cast<Acc*>(row)) + k, part_stride(), parts);
    }
    return load(row + k);
  }
  // A whole row of T, which need not be cleared before.
  template <class T>
  void put_row(Acc* row, const T* from) const {
    constexpr int L = kLanes<Acc>;
    for (int64_t k = 0; k < K; k += L) {
      put(row, k, load_part<Acc>(from + k, K - k < L ? K - k : L), L);
    }
    for (int64_t k = ceil_div(K, L) * L; parts && k < part_stride(); k += L)
      put(row, k, Vec<Acc>{}, L);
  }

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
inline constexpr int64_t kMostVectors = kHasTiles ? 16 : 12;  // of a block, all gates together
template <class Acc>
inline constexpr int64_t kProductSize = kRowBlock * kMostVectors * kLanes<Acc>;

// Around all products of a thread.
struct ProductSession {
#if defined(SEQKERN_TILES)
  ProductSession();
  TileSession tiles;
#else
  ProductSession() {}
#endif
};

// out [rows, G, width lanes of the block] = a [rows, K] B (+ out), out_stride from one row to the
// next. At most kRowBlock rows.
void product(const PackedMatrix<float>& b, int64_t block, const float* a, int64_t row_stride,
             int64_t rows, float* out, int64_t out_stride, bool add = false);
void product(const PackedMatrix<double>& b, int64_t block, const double* a, int64_t row_stride,
             int64_t rows, double* out, int64_t out_stride, bool add = false);

template <class Acc>
template <class T>
void PackedMatrix<Acc>::pack(int64_t block, const T* source, int64_t k_stride,
                             int64_t u_stride) const {
  constexpr int L = kLanes<Acc>;
  if (in_place) return;
  const int64_t w = width_of(block), first = first_unit(block);
  const int64_t row = together ? G * w * L : w * L;  // elements between k and k + 1
  for (int gate = 0; gate < G; ++gate) {
    Acc* panel =
        data + first_vector(block) * G * vector_size() + gate * w * (together ? L : vector_size());
    const T* of_gate = source + gate * units * u_stride;
    const auto pack_vector = [&](int64_t v, int64_t k,
                                 int64_t depth) __attribute__((always_inline)) {
      const int64_t u = first + v * L;
      const int64_t count = units - u < L ? units - u : L;
      const T* from = of_gate + u * u_stride;
      if constexpr (kHasTiles && kParts<T> > 0) {
        if (parts) {
          for (const int64_t end = k + depth; k < end; k += kTileDepth) {
            pack_tiles(numbers(panel) + (k / kTileDepth * parts * w + v) * kTileNumbers,
                       w * kTileNumbers, from + k * k_stride, k_stride, u_stride, K - k, count);
          }
          return;
        }
      }
      pack_lanes<Acc>(panel + k * row + v * L, row, from + k * k_stride, k_stride, u_stride, depth,
                      count);
    };
    if (u_stride != 1) {
      for (int64_t v = 0; v < w; ++v) pack_vector(v, 0, K);
      continue;
    }
    // The vectors of a row of the source are beside each other, and its rows may be pages apart:
    // all vectors of a few rows, then those of the next, which are asked for meanwhile.
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t k = 0; k < K; k += kTileDepth) {
      for (int64_t next = k + kTileDepth; next < k + 2 * kTileDepth && next < K; ++next) {
        for (int64_t u = 0; u < w * L; u += kLine) {
          __builtin_prefetch(of_gate + next * k_stride + first + u, 0, 3);
        }
      }
      for (int64_t v = 0; v < w; ++v) pack_vector(v, k, K - k < kTileDepth ? K - k : kTileDepth);
    }
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
