// The matrix products of attention, on blocks that stay in cache: packing and register tiles.
//
// Scores are kept transposed, S^T [keys, queries]: then a query's maximum and sum run down a column
// and need no shuffles, the keys are read where they are, and only the queries are packed. A
// block's visible part is a band: per row the columns [begin, end), whose ends never decrease.
#pragma once

#include <utility>  // integer_sequence: types, no code

#include "cpu/gemm_tile.h"
#include "cpu/part.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Integers of the size of Acc, so that a comparison of indices masks a vector of scores.
template <class Acc>
using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;

template <class Acc>
using IndexVec = typename VecTraits<Acc>::I;

template <class Acc>
SEQKERN_INLINE IndexVec<Acc> load_index(const Index<Acc>* p) {
  IndexVec<Acc> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class I>
SEQKERN_INLINE I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
SEQKERN_INLINE I most(I a, I b) {
  return a > b ? a : b;
}

// Whole vectors that hold n elements.
template <class Acc>
SEQKERN_INLINE int64_t round_up(int64_t n) {
  return (n + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
}

// Row stride of a buffer [n, D] whose columns are read in panels: not a multiple of 512 bytes,
// which would put a panel's rows into few cache sets.
template <class Acc>
SEQKERN_INLINE int64_t row_stride(int64_t D) {
  const int64_t padded = round_up<Acc>(D);
  return padded * static_cast<int64_t>(sizeof(Acc)) <= 256 ? padded : padded + kLanes<Acc>;
}

// A register tile is as high as the registers allow beside one row of B and an element of A.
template <int NV>
inline constexpr int kRowsOf = kManyRegisters ? (NV >= 4 ? 6 : 8) : (NV >= 3 ? 4 : 6);
inline constexpr int kBandRows = kRowsOf<2>;
inline constexpr int kMostRows = kManyRegisters ? 8 : 6;

// ---------------------------------------------------------------- packing

// Rows of D elements, source_stride apart, as Acc [n, stride], times factor, zeros to whole
// vectors.
template <class Acc, class T>
void copy_rows(Acc* to, int64_t stride, const T* source, int64_t source_stride, int64_t n,
               int64_t D, Acc factor) {
  constexpr int L = kLanes<Acc>;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < D; d += L) {
      store(to + i * stride + d, load_part<Acc>(source + i * source_stride + d, D - d) * factor);
    }
  }
}

// a0 b0 a1 b1 ...: of the lower halves, or of the upper ones.
template <bool kUpper, class Acc, int... i>
SEQKERN_INLINE Vec<Acc> zip(Vec<Acc> a, Vec<Acc> b, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  return shuffle<((kUpper ? L / 2 : 0) + i / 2 + i % 2 * L)...>(a, b);
}

// A square of vectors transposed: each round turns the bits of (row, column) by one place.
template <class Acc>
SEQKERN_INLINE void transpose_square(Vec<Acc> (&v)[kLanes<Acc>]) {
  constexpr int L = kLanes<Acc>;
  constexpr auto kLane = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<Acc> t[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = zip<false, Acc>(v[i], v[i + L / 2], kLane);
      t[2 * i + 1] = zip<true, Acc>(v[i], v[i + L / 2], kLane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = t[i];
  }
}

// Rows of D elements as columns: Acc [D, stride], `columns` of them (whole vectors), zeros from n.
template <class Acc, class T>
void transpose_rows(Acc* to, int64_t stride, const T* source, int64_t source_stride, int64_t n,
                    int64_t columns, int64_t D) {
  constexpr int L = kLanes<Acc>;
  for (int64_t i = 0; i < columns; i += L) {
    for (int64_t d = 0; d < D; d += L) {
      Vec<Acc> v[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) {
        v[r] = i + r < n ? load_part<Acc>(source + (i + r) * source_stride + d, D - d) : Vec<Acc>{};
      }
      transpose_square<Acc>(v);
      if (d + L <= D) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) store(to + (d + r) * stride + i, v[r]);
      } else {
        for (int64_t r = 0; d + r < D; ++r) store(to + (d + r) * stride + i, v[r]);
      }
    }
  }
}

// ---------------------------------------------------------------- products

// f(Count<NV>{}, v) over vectors [0, count) in panels of NV.
template <class F>
SEQKERN_INLINE void each_panel(int64_t count, F f) {
  int64_t v = 0;
  while (v < count) {
    const int64_t left = count - v;
    if constexpr (kManyRegisters) {
      if (left == 3 || left == 5 || left == 6 || left == 9) {
        f(Count<3>{}, v), v += 3;
      } else if (left >= 4) {
        f(Count<4>{}, v), v += 4;
      } else if (left == 2) {
        f(Count<2>{}, v), v += 2;
      } else {
        f(Count<1>{}, v), v += 1;
      }
    } else {
      if (left >= 3 && left % 2 == 1) {
        f(Count<3>{}, v), v += 3;
      } else if (left >= 2) {
        f(Count<2>{}, v), v += 2;
      } else {
        f(Count<1>{}, v), v += 1;
      }
    }
  }
}

// A sum over D is cut into parts of this many products, each added up on its own: the rounding
// errors of one long chain would grow with its length.
inline constexpr int64_t kChain = 64;

// tile of A^T-packed product: sum over d of a[r, d] b[d, columns].
template <class Acc, int R, int NV>
SEQKERN_INLINE Tile<Acc, R, NV> dot_tile(const Acc* a, int64_t a_stride, const Acc* b,
                                         int64_t b_stride, int64_t D) {
  Tile<Acc, R, NV> tile = {};
  const int64_t parts = (D + kChain - 1) / kChain, part = (D + parts - 1) / parts;
  multiply_add(tile, a, a_stride, 1, b, least(part, D), b_stride);
  for (int64_t d = part; d < D; d += part) {
    Tile<Acc, R, NV> more = {};
    multiply_add(more, a + d, a_stride, 1, b + d * b_stride, least(part, D - d), b_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) tile.c[r][j] += more.c[r][j];
    }
  }
  return tile;
}

// A group of rows of a band: the columns it computes, in whole vectors, and how far to both sides a
// product over a group of rows or columns could touch it.
struct BandGroup {
  int64_t height, first, last, low, high;
};
template <class Acc>
SEQKERN_INLINE BandGroup band_group(int64_t row, int64_t rows, int64_t columns,
                                    const int32_t* begin, const int32_t* end) {
  constexpr int L = kLanes<Acc>;
  BandGroup g;
  g.height = least<int64_t>(kBandRows, rows - row);
  const int64_t left = begin[row], right = end[row + g.height - 1];
  g.first = left / L * L;
  g.last = least(round_up<Acc>(right), columns);
  // Products take rows in groups of up to kMostRows, of other bounds than these, over all columns
  // of the group's rows; or they take columns so.
  const int64_t before = begin[most<int64_t>(row - kMostRows, 0)];
  const int64_t after = end[least(row + g.height - 1 + kMostRows, rows - 1)];
  g.low = most<int64_t>(least(left - kMostRows, before), 0) / L * L;
  g.high = least(round_up<Acc>(most(right + kMostRows, after)), columns);
  return g;
}

// The tiles of A B^T inside a band: rows [0, rows) of A, where row r needs the columns
// [begin[r], end[r]) of [0, columns). Calls f(tile, row, column) for each. A panel of B stays in L1
// while the rows pass by.
template <class Acc, class F>
SEQKERN_INLINE void band_tiles(const Acc* a, int64_t a_stride, const Acc* b, int64_t b_stride,
                               int64_t D, int64_t rows, int64_t columns, const int32_t* begin,
                               const int32_t* end, F f) {
  constexpr int L = kLanes<Acc>;
  const int64_t panel = (kManyRegisters && columns != 4 * L ? 3 : 2) * L;
  for (int64_t left = 0; left < columns; left += panel) {
    for (int64_t row = 0; row < rows; row += kBandRows) {
      const BandGroup g = band_group<Acc>(row, rows, columns, begin, end);
      const int64_t c = most(g.first, left);
      const int64_t vectors = (least(g.last, left + panel) - c) / L;
      if (vectors <= 0) continue;
      with_tile_rows<kBandRows>(g.height, [&](auto R_) __attribute__((always_inline)) {
        constexpr int R = decltype(R_)::value;
        const Acc* a_row = a + row * a_stride;
        if (kManyRegisters && vectors == 3) {
          f(dot_tile<Acc, R, 3>(a_row, a_stride, b + c, b_stride, D), row, c);
        } else if (vectors == 2) {
          f(dot_tile<Acc, R, 2>(a_row, a_stride, b + c, b_stride, D), row, c);
        } else {
          f(dot_tile<Acc, R, 1>(a_row, a_stride, b + c, b_stride, D), row, c);
        }
      });
    }
  }
}

// Calls f(row, from, to) for the columns beside a band that a product could touch: they have to
// hold zeros.
template <class Acc, class F>
SEQKERN_INLINE void beside_band(int64_t rows, int64_t columns, const int32_t* begin,
                                const int32_t* end, F f) {
  for (int64_t row = 0; row < rows; row += kBandRows) {
    const BandGroup g = band_group<Acc>(row, rows, columns, begin, end);
    // A group that nobody sees has no tiles at all.
    const int64_t first = least(g.first, g.high), last = most(g.last, first);
    for (int64_t r = row; r < row + g.height; ++r) {
      if (g.low < first) f(r, g.low, first);
      if (last < g.high) f(r, last, g.high);
    }
  }
}

// C [rows, D] = factor[row] C + A B, the factor 1 where null; rows [0, rows), of whose sums over
// [0, K) only [begin[row], end[row]) is not zero (and whose factor is 1 where that is empty). A:
// element (row, k) at a[row * a_row + k * a_k]. With `first`, C is written and not read.
template <class Acc>
void band_multiply(Acc* c, int64_t c_stride, const Acc* factor, bool first, const Acc* a,
                   int64_t a_row, int64_t a_k, const Acc* b, int64_t b_stride, int64_t D,
                   int64_t rows, int64_t K, const int32_t* begin, const int32_t* end) {
  constexpr int L = kLanes<Acc>;
  each_panel(round_up<Acc>(D) / L, [&](auto NV_, int64_t v) __attribute__((always_inline)) {
    constexpr int NV = decltype(NV_)::value;
    constexpr int R = kRowsOf<NV>;
    for (int64_t row = 0; row < rows; row += R) {
      const int64_t height = least<int64_t>(R, rows - row);
      const int64_t from = most<int64_t>(begin[row], 0);
      const int64_t count = least<int64_t>(end[row + height - 1], K) - from;
      if (count <= 0 && !first) continue;
      with_tile_rows<R>(height, [&](auto R_) __attribute__((always_inline)) {
        constexpr int kR = decltype(R_)::value;
        Tile<Acc, kR, NV> sum = {};
        multiply_add(sum, a + row * a_row + from * a_k, a_row, a_k, b + from * b_stride + v * L,
                     most<int64_t>(count, 0), b_stride);
        Acc* to = c + row * c_stride + v * L;
#pragma GCC unroll 8
        for (int r = 0; r < kR; ++r) {
          const Acc scale = factor ? factor[row + r] : Acc(1);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) {
            Vec<Acc> x = sum.c[r][j];
            if (!first) x += load(to + r * c_stride + j * L) * scale;
            store(to + r * c_stride + j * L, x);
          }
        }
      });
    }
  });
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
