// Products of bf16: the matrix unit of newer Xeons (AMX), and the vector instruction of others.
//
// A tile register holds up to 16 rows of 64 bytes. One instruction adds the product of A [16, 32]
// and B [32, 16], of bf16, to C [16, 16] of float, and makes 16 times as many multiply-adds per
// cycle as the vector units of the same core make of floats. A half has 11 significant bits where
// bf16 has 8: it is the sum of two bf16 numbers, exactly, the upper half of its float and the rest,
// and a product of halves is four of theirs. A float would be three and take six products or more:
// measured, that is faster than the vector units only while no other program runs on the core's
// second thread.
//
// AVX-512 with BF16 has an instruction that adds to each lane of a vector the products of a pair of
// bf16 numbers. It reads tiles as the unit does, for bf16 alone. Which processors gain by it:
// isa.cpp.
#pragma once

#include "cpu/simd.h"

namespace seqkern::cpu::SEQKERN_ISA {

#if defined(SEQKERN_TILES)
inline constexpr bool kMatrixUnit = true;
#else
inline constexpr bool kMatrixUnit = false;
#endif
#if defined(SEQKERN_BF16_PAIRS)
inline constexpr bool kHasTiles = true;
#else
inline constexpr bool kHasTiles = kMatrixUnit;
#endif

// bf16 numbers that add up to any T; 0: T is not multiplied in tiles.
template <class T>
inline constexpr int kParts = 0;
template <>
inline constexpr int kParts<Half> = kMatrixUnit ? 2 : 0;
template <>
inline constexpr int kParts<BFloat16> = 1;

inline constexpr int64_t kTileHeight = 16;        // rows of A and C, most
inline constexpr int64_t kTileDepth = 32;         // columns of A, rows of B
inline constexpr int64_t kTileNumbers = 16 * 32;  // of bf16 in a tile
inline constexpr int kColumnTiles = 4;            // of C that a product has in registers

SEQKERN_INLINE int64_t tile_depths(int64_t K) { return (K + kTileDepth - 1) / kTileDepth; }

// The upper half of every lane's bits, as the float that it is; v becomes the rest.
SEQKERN_INLINE VecU32 next_part(VecF& v) {
  const VecU32 upper = bitcast<VecU32>(v) & 0xffff0000u;
  v = v - bitcast<VecF>(upper);
  return upper;
}

// The first `parts` parts of v, one after the other, part_stride numbers apart.
SEQKERN_INLINE void store_parts(uint16_t* to, int64_t part_stride, int parts, VecF v,
                                int64_t count = kLanes<float>) {
  for (int p = 0; p < parts; ++p, to += part_stride) {
    const HalfBits bits = __builtin_convertvector(next_part(v) >> 16, HalfBits);
    if (count == kLanes<float>) [[likely]] {
      __builtin_memcpy(to, &bits, sizeof(bits));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = bits[i];
    }
  }
}

SEQKERN_INLINE VecF load_parts(const uint16_t* from, int64_t part_stride, int parts) {
  VecF sum = {};
  for (int p = 0; p < parts; ++p) {
    sum += load(reinterpret_cast<const BFloat16*>(from + p * part_stride));
  }
  return sum;
}

#if defined(SEQKERN_TILES)

// ldtilecfg's operand.
struct alignas(64) TileShapes {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

#if !defined(SEQKERN_TILES_IN_SOFTWARE)

SEQKERN_INLINE void set_tile_shapes(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
SEQKERN_INLINE TileShapes tile_shapes() {
  TileShapes shapes;
  asm volatile("sttilecfg %0" : "=m"(shapes));
  return shapes;
}
SEQKERN_INLINE void release_tiles() { asm volatile("tilerelease"); }

// Rows of tile i are `stride` bytes apart.
template <int i>
SEQKERN_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(i) : "memory");
}
template <int i>
SEQKERN_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(i) : "memory");
}
template <int i>
SEQKERN_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(i));
}
// c [m, n] += sum over k of a [m, 2 k] b [k, 2 n] + a [m, 2 k + 1] b [k, 2 n + 1]
template <int c, int a, int b>
SEQKERN_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else  // The same in plain C++, for tests on processors without the unit.

inline thread_local struct {
  TileShapes shapes;
  uint8_t tiles[8][16][64];
} tile_state;

SEQKERN_INLINE void set_tile_shapes(const TileShapes& shapes) {
  tile_state.shapes = shapes;
  __builtin_memset(tile_state.tiles, 0, sizeof(tile_state.tiles));
}
SEQKERN_INLINE TileShapes tile_shapes() { return tile_state.shapes; }
SEQKERN_INLINE void release_tiles() { set_tile_shapes(TileShapes{}); }
template <int i>
SEQKERN_INLINE void load_tile(const void* from, int64_t stride) {
  for (int r = 0; r < tile_state.shapes.rows[i]; ++r) {
    __builtin_memcpy(tile_state.tiles[i][r], static_cast<const char*>(from) + r * stride,
                     tile_state.shapes.row_bytes[i]);
  }
}
template <int i>
SEQKERN_INLINE void store_tile(void* to, int64_t stride) {
  for (int r = 0; r < tile_state.shapes.rows[i]; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, tile_state.tiles[i][r],
                     tile_state.shapes.row_bytes[i]);
  }
}
template <int i>
SEQKERN_INLINE void zero_tile() {
  __builtin_memset(tile_state.tiles[i], 0, sizeof(tile_state.tiles[i]));
}
template <int c, int a, int b>
SEQKERN_INLINE void multiply_tiles() {
  const auto number = [](int tile, int row, int i) {
    uint16_t bits;
    __builtin_memcpy(&bits, &tile_state.tiles[tile][row][2 * i], 2);
    // Subnormal numbers are zeros to the unit.
    return bitcast<float>(bits & 0x7f80u ? static_cast<uint32_t>(bits) << 16 : 0u);
  };
  for (int m = 0; m < tile_state.shapes.rows[c]; ++m) {
    for (int n = 0; n < 16; ++n) {
      // The unit adds up the first numbers of all pairs, and the second ones, before the rest.
      float sum, first = 0, second = 0;
      __builtin_memcpy(&sum, &tile_state.tiles[c][m][4 * n], 4);
      for (int k = 0; k < tile_state.shapes.rows[b]; ++k) {
        first = __builtin_fmaf(number(a, m, 2 * k), number(b, k, 2 * n), first);
        second = __builtin_fmaf(number(a, m, 2 * k + 1), number(b, k, 2 * n + 1), second);
      }
      sum += first + second;
      __builtin_memcpy(&tile_state.tiles[c][m][4 * n], &sum, 4);
    }
  }
}

#endif

// Tiles 0 to `high` have so many rows, the others 16; all rows are 64 bytes.
SEQKERN_INLINE void shape_tiles(int64_t rows, int high) {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = i <= high ? static_cast<uint8_t>(rows) : 16;
  }
  set_tile_shapes(shapes);
}

// While this lives a thread shapes its tiles as it likes; then it has those of another library
// again, which trusts to find them.
struct TileSession {
  TileShapes before;
  TileSession() : before(tile_shapes()) {}
  ~TileSession() {
    if (before.palette) {
      set_tile_shapes(before);
    } else {
      release_tiles();
    }
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

#endif

}  // namespace seqkern::cpu::SEQKERN_ISA
