// The parts of tensor-core attention: tiles in shared memory, products of them, dropout in the
// layout of the accumulators. A warp's fragments are as ptx.cuh describes them.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/ptx.cuh"

namespace seqkern::cuda {

// ---------------------------------------------------------------- tiles in shared memory

// Rows of kWidth 16-bit elements, in chunks of 16 bytes. The chunks of a row are permuted so that
// the same chunk of eight neighbouring rows, what one matrix of ldmatrix reads, lies in eight
// different groups of four banks. Where a row is a multiple of 128 bytes, row % 8 is mixed in;
// where it is 64, neighbours are half the banks apart already, and row / 2 % 4 is.
template <int kWidth>
struct Tile {
  static constexpr int kChunks = kWidth / 8;
  static constexpr int kMixed = kChunks % 8 == 0 ? 8 : 4;  // chunks permuted among themselves
  static_assert(kChunks % kMixed == 0);

  // All positions count elements.
  __device__ __forceinline__ static int at(int row, int chunk) {
    const int mix = kMixed == 8 ? row % 8 : row / 2 % 4;
    return (row * kChunks + (chunk ^ mix)) * 8;
  }
  // at(row + rows, chunk + chunks) from at(row, chunk), where rows is a multiple of 8 and chunks an
  // even number (and chunk 0 or 1): the mix is the row's own, so one exclusive-or with a constant,
  // and additions that become the instruction's immediate operand. Left to itself the compiler
  // keeps a register per address.
  __device__ __forceinline__ static int moved(int position, int rows, int chunks) {
    return (position ^ (chunks % kMixed * 8)) + chunks / kMixed * kMixed * 8 + rows * kWidth;
  }
};

// Rows of a tensor: row r begins at first + r * stride and has `width` elements.
template <class T>
struct TensorRows {
  T* first;
  int64_t stride;
  int width;
  int aligned;  // whether every row begins on 16 bytes
};

// From tensor row `row` on of head h.
template <class T, class Void>
__device__ __forceinline__ TensorRows<T> rows_of(Void* base, const HeadStrides& s, int64_t D, int b,
                                                 int h, int row) {
  T* first = static_cast<T*>(base) + offset_of(s, b, h, row);
  return {first, s.t, static_cast<int>(D),
          // Of the kernel's parameters alone: the answer then costs no register.
          reinterpret_cast<uintptr_t>(base) % 16 == 0 && (s.b | s.h | s.t) % 8 == 0};
}

// Asks for rows [begin, begin + kRows) of a tensor, counted from `first`, which exist, begin on 16
// bytes and are as wide as the tile.
template <int kWidth, int kRows, int kThreads, class T>
__device__ __forceinline__ void copy_tile(T* tile, const T* first, int64_t stride, int begin) {
  constexpr int kChunks = Tile<kWidth>::kChunks;
  constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0);
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int row = static_cast<int>(threadIdx.x) / kChunks;
  // Unsigned, for one multiplication less: what exists is not negative.
  const T* source = first + static_cast<uint32_t>(begin + row) * stride + 8 * chunk;
  const int place = Tile<kWidth>::at(row, chunk);
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    // With the swizzle's period in kRowsAtOnce the places are a constant apart: spelled out, or the
    // compiler keeps a register for each.
    const int next = kRowsAtOnce % 8 == 0 ? place + i * kRowsAtOnce * kWidth
                                          : Tile<kWidth>::at(row + i * kRowsAtOnce, chunk);
    cp_async<16>(tile + next, source);
    source += kRowsAtOnce * stride;
  }
}

// Asks for rows [0, kRows): those outside [from, to), and columns from the width on, are zeros.
// Aligned rows arrive in the background, others at once.
template <int kWidth, int kRows, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const TensorRows<const T>& rows, int from,
                                          int to) {
  constexpr int kChunks = Tile<kWidth>::kChunks;
  constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0);
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  int row = static_cast<int>(threadIdx.x) / kChunks;
  const int left = rows.width - 8 * chunk;
  const int inside = left < 0 ? 0 : left > 8 ? 8 : left;
  const T* source = rows.first + row * rows.stride + 8 * chunk;
  const int64_t step = kRowsAtOnce * rows.stride;
  if (rows.aligned) {
    // A whole tile, as most are. At width 256 its places are no constant apart, and those of all
    // rows of a block too many for the registers.
    if constexpr (kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0) {
      if (from <= 0 && to >= kRows && rows.width == kWidth) {
        copy_tile<kWidth, kRows, kThreads>(tile, rows.first, rows.stride, 0);
        return;
      }
    }
#pragma unroll 1
    for (; row < kRows; row += kRowsAtOnce) {
      // Where nothing is read the address only has to be aligned.
      cp_async<16>(tile + Tile<kWidth>::at(row, chunk), source,
                   row >= from && row < to ? 2 * inside : 0);
      source += step;
    }
    return;
  }
#pragma unroll 1
  for (; row < kRows; row += kRowsAtOnce) {
    uint32_t words[4] = {};
    if (row >= from && row < to) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < inside) words[i / 2] |= static_cast<uint32_t>(source[i].bits) << (i % 2 * 16);
      }
    }
    *reinterpret_cast<uint4*>(tile + Tile<kWidth>::at(row, chunk)) =
        make_uint4(words[0], words[1], words[2], words[3]);
    source += step;
  }
}

// Rows of a tensor that a block loads tile by tile.
template <class T>
struct WalkedRows {
  TensorRows<const T> all;
  int from, to;  // rows [from, to) exist, the others are zeros
};

// Asks for kRows of them from row `begin` on, of a head that begins `before` elements later.
template <int kWidth, int kRows, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const WalkedRows<T>& rows, int begin,
                                          int64_t before = 0) {
  const TensorRows<const T>& all = rows.all;
  const T* first = all.first + before + begin * all.stride;
  load_tile<kWidth, kRows, kThreads>(tile,
                                     TensorRows<const T>{first, all.stride, all.width, all.aligned},
                                     rows.from - begin, rows.to - begin);
}

// Two of them that are walked together: K and V, or Q and dO. In shared memory: finding anew where
// a tile is takes a good part of the step, and there is no register free to keep it in.
template <class T>
struct Walk {
  WalkedRows<T> first, second;
  int whole_from, whole_to;  // tiles within these rows can be copied as they are

  __device__ __forceinline__ void set(const WalkedRows<T>& a, const WalkedRows<T>& b, int width) {
    first = a;
    second = b;
    const bool whole = a.all.aligned && b.all.aligned && a.all.width == width;
    whole_from = max(a.from, b.from);
    whole_to = whole ? min(a.to, b.to) : 0;
  }
  __device__ __forceinline__ bool is_whole(int begin, int rows) const {
    return begin >= whole_from && begin + rows <= whole_to;
  }
};

// Tile rows [from, to) to the tensor, by `threads` threads of which this is number `thread`.
template <int kWidth, class T>
__device__ __forceinline__ void store_tile(const T* tile, const TensorRows<T>& rows, int from,
                                           int to, int thread, int threads) {
  constexpr int kChunks = Tile<kWidth>::kChunks;
#pragma unroll 1
  for (int copy = from * kChunks + thread; copy < to * kChunks; copy += threads) {
    const int row = copy / kChunks, chunk = copy % kChunks;
    const int left = rows.width - 8 * chunk;
    const T* source = tile + Tile<kWidth>::at(row, chunk);
    T* target = rows.first + row * rows.stride + 8 * chunk;
    if (rows.aligned && left >= 8) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
#pragma unroll 1
      for (int i = 0; i < left && i < 8; ++i) target[i] = source[i];
    }
  }
}

// ---------------------------------------------------------------- products

// acc[m][n] += a b^T over the width: rows a_row + 16 m of tile a, rows b_row + 8 n of tile b.
template <int kWidth, class T, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], const T* a, int a_row,
                                              const T* b, int b_row) {
  static_assert(N % 2 == 0);
  using Positions = Tile<kWidth>;
  // Opaque: positions that were kept from product to product would not fit in registers.
  const int lane = opaque(static_cast<int>(threadIdx.x) % kWarp);
  const int of_a = Positions::at(a_row + lane % 16, lane / 16);
  const int of_b = Positions::at(b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  // Unrolled further, the compiler looks so far ahead that it runs out of registers.
  constexpr int kUnrolled = kWidth / 16 < 4 ? kWidth / 16 : 4;
#pragma unroll 1
  for (int done = 0; done < kWidth / 16;
       done += kUnrolled, a += 16 * kUnrolled, b += 16 * kUnrolled) {
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      uint32_t a_fragment[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m)
        ldmatrix<false>(a_fragment[m], a + Positions::moved(of_a, 16 * m, 2 * k));
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t two[4];
        ldmatrix<false>(two, b + Positions::moved(of_b, 8 * n, 2 * k));
        const uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma_m16n8k16<T>(acc[m][n], a_fragment[m], first, acc[m][n]);
          mma_m16n8k16<T>(acc[m][n + 1], a_fragment[m], second, acc[m][n + 1]);
        }
      }
    }
  }
}

// acc[m][n] += p b: p in registers, over rows b_row .. b_row + 16 K of tile b, columns from 8 n on.
template <int kWidth, class T, int M, int N, int K>
__device__ __forceinline__ void multiply_columns(float (&acc)[M][N][4],
                                                 const uint32_t (&p)[M][K][4], const T* b,
                                                 int b_row) {
  static_assert(N % 2 == 0);
  using Positions = Tile<kWidth>;
  const int lane = opaque(static_cast<int>(threadIdx.x) % kWarp);  // as in multiply_rows
  const int of_b = Positions::at(b_row + lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t two[4];
      ldmatrix<true>(two, b + Positions::moved(of_b, 16 * k, n));
      const uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16<T>(acc[m][n], p[m][k], first, acc[m][n]);
        mma_m16n8k16<T>(acc[m][n + 1], p[m][k], second, acc[m][n + 1]);
      }
    }
  }
}

// An accumulator of a product, seen as the left operand of the next: two neighbouring blocks of
// eight columns are the sixteen of its k dimension.
template <class T, int M, int N>
__device__ __forceinline__ void as_operand(const float (&x)[M][N][4], uint32_t (&p)[M][N / 2][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      p[m][n / 2][n % 2 * 2] = pack2(TypeTag<T>{}, x[m][n][0], x[m][n][1]);
      p[m][n / 2][n % 2 * 2 + 1] = pack2(TypeTag<T>{}, x[m][n][2], x[m][n][3]);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
    }
  }
}

// acc * factor to tile rows row + 16 m.
template <int kWidth, class T, int M, int N>
__device__ __forceinline__ void to_tile(T* tile, const float (&acc)[M][N][4], float factor,
                                        int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* pair = tile + Tile<kWidth>::at(row + 16 * m + 8 * half + lane / 4, n) + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(pair) =
            pack2(TypeTag<T>{}, acc[m][n][2 * half] * factor, acc[m][n][2 * half + 1] * factor);
      }
    }
  }
}

// ---------------------------------------------------------------- dropout

// Which of a lane's accumulators are kept, for 16 rows and 8 N columns (N <= 8): one draw per lane
// and block of eight columns, so none is drawn twice; the four bits of each travel to the lanes
// they belong to.

// Rows are queries: a draw covers four columns of one row. Lane 4 g + t holds columns 2 t, 2 t + 1
// of rows g and g + 8, so a pair of lanes shares the draws of both rows: the even lane draws row
// g's, the odd one row g + 8's.
template <int N>
struct KeepOfQueryRows {
  static_assert(N <= 8);
  __device__ __forceinline__ KeepOfQueryRows(const Dropout& dropout, int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      mine |= dropout.keep(row + lane / 4 + lane % 2 * 8, column / 4 + 2 * n + lane / 2 % 2)
              << (4 * n);
    }
    const int shift = lane % 2 * 2;
    bits[0] = __shfl_sync(kAllLanes, mine, lane & ~1) >> shift;
    bits[1] = __shfl_sync(kAllLanes, mine, lane | 1) >> shift;
  }
  __device__ __forceinline__ bool of(int n, int element) const {
    return bits[element / 2] >> (4 * n + element % 2) & 1;
  }
  uint32_t bits[2];
};

// Rows are keys: a draw covers four rows of one column. The lanes that hold the same two columns of
// four neighbouring rows share four draws, one of each: columns 2 t and 2 t + 1, rows g and g + 8.
template <int N>
struct KeepOfKeyRows {
  static_assert(N <= 8);
  __device__ __forceinline__ KeepOfKeyRows(const Dropout& dropout, int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int which = lane / 4 % 4;
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      mine |= dropout.keep(column + 8 * n + lane % 4 * 2 + which % 2,
                           row / 4 + lane / 16 + which / 2 * 2)
              << (4 * n);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      bits[e] = __shfl_sync(kAllLanes, mine, (lane & ~12) | e << 2) >> which;
  }
  __device__ __forceinline__ bool of(int n, int element) const {
    return bits[element] >> (4 * n) & 1;
  }
  uint32_t bits[4];
};

// ---------------------------------------------------------------- which kernel

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls f(TypeTag<T>, Constant<kWidth>, kOptions) for the inputs. kOptions: a score is more than a
// positive multiple of the product, or is dropped.
template <class F>
void specialize_mma(const AttentionInputs& in, F&& f) {
  const bool options = in.softcap > 0 || in.alibi_slopes || in.dropout_p > 0 || !(in.scale > 0);
  const auto of_type = [&](auto tag) {
    const auto of_width = [&](auto width) {
      options ? f(tag, width, std::true_type{}) : f(tag, width, std::false_type{});
    };
    if (in.D <= 32) return of_width(Constant<32>{});
    if (in.D <= 64) return of_width(Constant<64>{});
    if (in.D <= 128) return of_width(Constant<128>{});
    of_width(Constant<256>{});
  };
  in.dtype == DType::kFloat16 ? of_type(TypeTag<Half>{}) : of_type(TypeTag<BFloat16>{});
}

// Calls f(TypeTag<T>, Constant<kWidth>, kOptions, "<dtype, width, options>") for each of them.
template <class F>
void for_each_mma(F&& f) {
  const auto of_width = [&](auto tag, auto width, const std::string& name) {
    const std::string shape = "<" + name + ", D " + std::to_string(width());
    f(tag, width, std::false_type{}, shape + ">");
    f(tag, width, std::true_type{}, shape + ", options>");
  };
  const auto of_type = [&](auto tag, const std::string& name) {
    of_width(tag, Constant<32>{}, name);
    of_width(tag, Constant<64>{}, name);
    of_width(tag, Constant<128>{}, name);
    of_width(tag, Constant<256>{}, name);
  };
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
