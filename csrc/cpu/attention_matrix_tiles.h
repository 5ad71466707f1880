// Attention in products of bf16 (matrix_tiles.h): what forward and backward share. Blocks of bf16
// as tiles, their products, masks and weights of a strip (docs/math/attention.md).
//
// Scores are transposed here, too, S^T [keys, queries], in strips of 32 queries. The keys are then
// rows of the left operand as they are, the queries, packed once per task, are the right one; two
// rows of weights zipped are a row of the right operand of P V, and one row a row of the left
// operand of P^T dout. A tile is 1 KB in one piece: no two of its rows share a cache set.
#pragma once

#include "cpu/attention.h"
#include "cpu/bf16_pairs.h"
#include "cpu/matrix_tiles.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

inline constexpr int64_t kStrip = 32;  // queries of a strip and keys of a group
inline constexpr int L = kLanes<float>;
static_assert(L == 16);

// All tiles whole, in a thread that has registers for them.
#if defined(SEQKERN_TILES)
struct WholeTiles : TileSession {
  WholeTiles() { shape_tiles(kTileHeight, 7); }
};
#else
struct WholeTiles {
  WholeTiles() {}
};
#endif

// ---------------------------------------------------------------- bf16

typedef uint16_t Words __attribute__((vector_size(64)));

SEQKERN_INLINE void store_words(uint16_t* to, Words v) { __builtin_memcpy(to, &v, sizeof(v)); }

// 32 numbers from d on of a row of D, zeros beyond.
SEQKERN_INLINE Words load_words(const BFloat16* row, int64_t d, int64_t D) {
  Words v = {};
  if (d + 32 <= D) [[likely]] {
    __builtin_memcpy(&v, row + d, sizeof(v));
  } else if (d < D) {
    __builtin_memcpy(&v, row + d, (D - d) * sizeof(uint16_t));
  }
  return v;
}

// a's lanes, then b's, rounded to nearest even. Subnormal results may be zeros, which they are to
// the products.
SEQKERN_INLINE Words round_two(VecF a, VecF b) {
#if defined(__AVX512BF16__)
  return (Words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  BFloat16 both[2 * L];
  store(both, a);
  store(both + L, b);
  return load_words(both, 0, 2 * L);
#endif
}

// a0 b0 a1 b1 .. of the first (second) 16 numbers of each.
template <bool kSecond, int... i>
SEQKERN_INLINE Words zip_words(Words a, Words b, std::integer_sequence<int, i...>) {
  return shuffle<((kSecond ? 16 : 0) + i / 2 + i % 2 * 32)...>(a, b);
}
// a0 a16 a1 a17 ..
template <int... i>
SEQKERN_INLINE Words zip_halves(Words a, std::integer_sequence<int, i...>) {
  return shuffle<(i / 2 + i % 2 * 16)...>(a, a);
}
inline constexpr auto kWords = std::make_integer_sequence<int, 32>{};

// ---------------------------------------------------------------- blocks as tiles

// Rows [n, D] of a tensor.
struct Rows {
  const BFloat16* at;
  int64_t stride, n, D;

  SEQKERN_INLINE Words words(const Rows& r, int64_t i, int64_t d) {
    return i < r.n ? load_words(r.at + i * r.stride, d, r.D) : Words{};
  }
};

// Left operand, rows as they are: tiles [rows / 16, depths] of 16 rows and 32 columns.
__attribute__((noinline)) inline void pack_rows(uint16_t* to, const Rows& rows, int64_t count) {
  const int64_t depths = tile_depths(rows.D);
  for (int64_t i = 0; i < count; ++i) {
    uint16_t* line = to + i / 16 * depths * kTileNumbers + i % 16 * 32;
    for (int64_t k = 0; k < depths; ++k) {
      store_words(line + k * kTileNumbers, Rows::words(rows, i, k * 32));
    }
  }
}

// Right operand, rows as columns: tiles [rows / 16, depths] of 32 deep and 16 rows.
__attribute__((noinline)) inline void pack_columns(uint16_t* to, const Rows& rows, int64_t count) {
  const int64_t depths = tile_depths(rows.D);
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t k = 0; k < depths; ++k, to += kTileNumbers) {
      VecU32 square[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) square[r] = bitcast<VecU32>(Rows::words(rows, i + r, k * 32));
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) store_words(to + 32 * r, bitcast<Words>(square[r]));
    }
  }
}

// Tiles [rows / 32, columns / 16], rows as the depth: as the right operand 32 deep, 16 columns; or,
// kLeft, as the left one: its rows are the columns of these. (Whole pairs of tiles.)
template <bool kLeft>
__attribute__((noinline)) void pack_depths(uint16_t* to, const Rows& rows, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) {
    for (int64_t d = 0; d < rows.D; d += 32, to += 2 * kTileNumbers) {
      VecU32 square[2][L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) {
        const Words a = Rows::words(rows, i + 2 * r, d), b = Rows::words(rows, i + 2 * r + 1, d);
        square[0][r] = bitcast<VecU32>(zip_words<false>(a, b, kWords));
        square[1][r] = bitcast<VecU32>(zip_words<true>(a, b, kWords));
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        if constexpr (kLeft) transpose(square[half]);
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) {
          store_words(to + half * kTileNumbers + 32 * r, bitcast<Words>(square[half][r]));
        }
      }
    }
  }
}

// ---------------------------------------------------------------- products

// An operand: tile (i, depth) is i * across + depth * along tiles after the first.
struct Operand {
  const uint16_t* at;
  int64_t across, along;

  const uint16_t* tile(int64_t i, int64_t depth) const {
    return at + (i * across + depth * along) * kTileNumbers;
  }
};

#if defined(SEQKERN_TILES)

// Asks for a tile's lines: a tile is read faster than second-level cache can answer.
SEQKERN_INLINE void fetch_tile(const uint16_t* tile) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) __builtin_prefetch(tile + 32 * r);
}

// C [16 M, 16 N] = A B, or C + A B, from row tile m and column tile n on.
template <int M, int N>
SEQKERN_INLINE void multiply_square(const Operand& a, int64_t m, const Operand& b, int64_t n,
                                    int64_t depths, float* c, int64_t stride, bool add) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  float* below = c + 16 * stride;
  if (add) {
    load_tile<0>(c, bytes);
    if constexpr (N > 1) load_tile<1>(c + 16, bytes);
    if constexpr (M > 1) load_tile<2>(below, bytes);
    if constexpr (M > 1 && N > 1) load_tile<3>(below + 16, bytes);
  } else {
    zero_tile<0>();
    if constexpr (N > 1) zero_tile<1>();
    if constexpr (M > 1) zero_tile<2>();
    if constexpr (M > 1 && N > 1) zero_tile<3>();
  }
  for (int64_t k = 0; k < depths; ++k) {
    load_tile<6>(b.tile(n, k), 64);
    load_tile<4>(a.tile(m, k), 64);
    fetch_tile(a.tile(m + M, k));
    multiply_tiles<0, 4, 6>();
    if constexpr (N > 1) {
      load_tile<7>(b.tile(n + 1, k), 64);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (M > 1) {
      load_tile<5>(a.tile(m + 1, k), 64);
      fetch_tile(a.tile(m + M + 1, k));
      multiply_tiles<2, 5, 6>();
    }
    if constexpr (M > 1 && N > 1) multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(c, bytes);
  if constexpr (N > 1) store_tile<1>(c + 16, bytes);
  if constexpr (M > 1) store_tile<2>(below, bytes);
  if constexpr (M > 1 && N > 1) store_tile<3>(below + 16, bytes);
}

// C [16 rows, 32] = A B, where B is short enough to stay in registers: half the loads.
template <int kDepths>
SEQKERN_INLINE void multiply_short(const Operand& a, int64_t rows, const Operand& b, float* c) {
  constexpr int64_t kBytes = kStrip * sizeof(float);
  load_tile<4>(b.tile(0, 0), 64);
  load_tile<5>(b.tile(1, 0), 64);
  if constexpr (kDepths > 1) {
    load_tile<6>(b.tile(0, 1), 64);
    load_tile<7>(b.tile(1, 1), 64);
  }
  for (int64_t m = 0; m < rows; ++m, c += 16 * kStrip) {
    zero_tile<0>();
    zero_tile<1>();
    load_tile<2>(a.tile(m, 0), 64);
    fetch_tile(a.tile(m + 2, 0));
    multiply_tiles<0, 2, 4>();
    multiply_tiles<1, 2, 5>();
    if constexpr (kDepths > 1) {
      load_tile<3>(a.tile(m, 1), 64);
      fetch_tile(a.tile(m + 2, 1));
      multiply_tiles<0, 3, 6>();
      multiply_tiles<1, 3, 7>();
    }
    store_tile<0>(c, kBytes);
    store_tile<1>(c + 16, kBytes);
  }
}

#else

// C [16 M, 16 N] = A B, or C + A B, from row tile m and column tile n on.
template <int M, int N>
SEQKERN_INLINE void multiply_square(const Operand& a, int64_t m, const Operand& b, int64_t n,
                                    int64_t depths, float* c, int64_t stride, bool add) {
  constexpr int kRows = kPairRows<N>;
  const PairOperand right{b.tile(n, 0), b.across * kTileNumbers, b.along * kTileNumbers};
  for (int64_t r = 0; r < 16 * M; r += kRows) {
    const PairOperand left{a.tile(m + r / 16, 0) + r % 16 * kTileDepth, kTileDepth,
                           a.along * kTileNumbers};
    multiply_pairs<kRows, N>(left, right, depths * kTileDepth, c + r * stride, stride, add);
  }
}

#endif

// C [16 rows, 16 columns] = A B, or C + A B.
__attribute__((noinline)) inline void multiply_block(const Operand& a, int64_t rows,
                                                     const Operand& b, int64_t columns,
                                                     int64_t depths, float* c, int64_t stride,
                                                     bool add) {
  for (int64_t m = 0; m < rows; m += 2) {
    for (int64_t n = 0; n < columns; n += 2) {
      float* to = c + m * 16 * stride + n * 16;
      with_tile_rows<2>(least<int64_t>(rows - m, 2), [&](auto M) {
        with_tile_rows<2>(least<int64_t>(columns - n, 2), [&](auto N) {
          multiply_square<decltype(M)::value, decltype(N)::value>(a, m, b, n, depths, to, stride,
                                                                  add);
        });
      });
    }
  }
}

// A strip's scores, or their gradients: C [16 rows, 32] = A B.
__attribute__((noinline)) inline void multiply_strip(const Operand& a, int64_t rows,
                                                     const Operand& b, int64_t depths, float* c) {
#if defined(SEQKERN_TILES)
  if (depths == 1) return multiply_short<1>(a, rows, b, c);
  if (depths == 2) return multiply_short<2>(a, rows, b, c);
#endif
  multiply_block(a, rows, b, 2, depths, c, kStrip, false);
}

// ---------------------------------------------------------------- scores and weights

// Queries of a task in whole strips: the keys that each sees; those after the last repeat it.
struct Strips {
  static constexpr int64_t kMost = 384;
  int64_t n, count;
  alignas(64) int32_t first_key[kMost], end_key[kMost];

  void set(const AttentionRow& row, int64_t i, int64_t queries) {
    n = queries;
    count = (queries + kStrip - 1) / kStrip;
    for (int64_t c = 0; c < count * kStrip; ++c) {
      const int64_t q = i + least(c, queries - 1);
      first_key[c] = static_cast<int32_t>(row.first_key(q));
      end_key[c] = static_cast<int32_t>(row.end_key(q));
    }
  }

  // Groups of a block of keys [j, j + keys) that a strip sees something of.
  struct Groups {
    int64_t begin, end;
  };
  Groups groups(int64_t strip, int64_t j, int64_t keys) const {
    const int64_t low = most<int64_t>(first_key[strip * kStrip] - j, 0);
    const int64_t high = least<int64_t>(end_key[strip * kStrip + kStrip - 1] - j, keys);
    return {low / kStrip, (most<int64_t>(high, 0) + kStrip - 1) / kStrip};
  }

  // Whether all of a strip sees all keys [j, j + 32), which exist up to `end`.
  bool whole(int64_t strip, int64_t j, int64_t end) const {
    const int64_t c = strip * kStrip;
    return first_key[c + kStrip - 1] <= j && end_key[c] >= j + kStrip && j + kStrip <= end;
  }

  // Makes products of 32 keys from j on scores [32, 32]: the options, and -inf where not visible.
  __attribute__((noinline)) void finish(float* s, int64_t strip, int64_t j, int64_t end,
                                        const Transform<float>& transform, float* cap) const {
    for (int64_t r = 0; r < kStrip; ++r) {
      for (int64_t c = 0; c < kStrip; c += L) {
        const VecI32 first = load_index<float>(first_key + strip * kStrip + c);
        const VecI32 last = load_index<float>(end_key + strip * kStrip + c);
        float* at = s + r * kStrip + c;
        VecF x = load(at);
        if (!transform.plain) {
          x = transform.apply(x, j + r, last, cap ? cap + r * kStrip + c : nullptr);
        }
        const VecI32 key = VecI32{} + static_cast<int32_t>(j + r);
        const VecI32 exists = VecI32{} - (j + r < end ? 1 : 0);
        x = select((first <= key) & (last > key) & exists, x, splat<VecF>(-kInfinity<float>));
        store(at, x);
      }
    }
  }
};

// 2^(x c - shift) for results of at most about 1: for weights, which lie in [0, 1]; exactly 1 for
// the power 0, 0 below 2^-125, NaN for NaN. Fewer steps than exp_nonpositive: the product with c
// takes in the step to base 2.
struct Power {
  static constexpr float kRound = 12582912.0f + 127.0f;  // vmath.h
  // 2^r on |r| <= 1/2, the constant 1; relative error under 2 * 2^-24.
  static constexpr float kP[] = {0.693147004f, 0.240222424f, 0.0555073395f, 0.00967150927f,
                                 0.00132646994f};

  SEQKERN_INLINE VecF of(VecF shifted, VecF r) {
    VecF p = splat<VecF>(kP[4]);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) p = p * r + kP[i];
    p = p * r + 1.0f;
    const VecF scale = bitcast<VecF>(bitcast<VecU32>(shifted) << 23);
    const VecI32 none = shifted < kRound - 125.0f;  // false for NaN, which passes
    return bitcast<VecF>(bitcast<VecI32>(VecF(p * scale)) & ~none);
  }
  SEQKERN_INLINE VecF of(VecF x, float c) {
    const VecF shifted = x * c + kRound;
    return of(shifted, x * c - (shifted - kRound));
  }
  SEQKERN_INLINE VecF of(VecF x, float c, VecF shift) {
    const VecF power = x * c - shift;
    const VecF shifted = power + kRound;
    return of(shifted, power - (shifted - kRound));
  }
};
inline constexpr float kLog2e = 1.44269504088896340736f;

// Whether forward and backward are in tiles; the kernels of AVX-512 take the others. Zeros that
// fill a tile take the vector units as long as other numbers: measured, in docs/math/attention.md.
SEQKERN_INLINE bool in_tiles(const AttentionInputs& in) {
  return in.dtype == DType::kBFloat16 && (kMatrixUnit || (in.D > 16 && in.Tq > 16 && in.Tk >= 64));
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
