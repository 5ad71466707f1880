// Products of bf16 numbers in the vector units, by the instruction that adds to each lane of a
// vector the products of a pair (AVX-512 with BF16). Operands are laid out as for the matrix unit,
// in tiles (matrix_tiles.h): a row of the left one has its numbers side by side, a line of the
// right one the pairs of 16 columns.
#pragma once

#include "cpu/matrix_tiles.h"

#if defined(SEQKERN_BF16_PAIRS)

namespace seqkern::cpu::SEQKERN_ISA {

// `step` numbers lead to the next row of a left operand, or the next 16 columns of a right one,
// `depth` to the next tile along K.
struct PairOperand {
  const uint16_t* at;
  int64_t step, depth;
};

// Rows whose sums, of NV vectors each, fit beside a line of the right operand into the registers.
template <int NV>
inline constexpr int kPairRows = NV > 3 ? 6 : 8;

// out [R, NV vectors] = a b (+ out), summed over K numbers; an odd one's partner is multiplied,
// too.
template <int R, int NV>
SEQKERN_INLINE void multiply_pairs(PairOperand a, PairOperand b, int64_t K, float* out,
                                   int64_t stride, bool add) {
  constexpr int L = kLanes<float>;
  __m512 sum[R][NV] = {};
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = (__m512)load(out + r * stride + v * L);
    }
  }
  for (int64_t k = 0; k < K; k += kTileDepth, a.at += a.depth, b.at += b.depth) {
    const int64_t pairs = K - k < kTileDepth ? (K - k + 1) / 2 : kTileDepth / 2;
    for (int64_t j = 0; j < pairs; ++j) {
      __m512bh b_j[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        __builtin_memcpy(&b_j[v], b.at + v * b.step + j * kTileDepth, sizeof(b_j[v]));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, a.at + r * a.step + 2 * j, sizeof(pair));
        const __m512bh a_rj = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], a_rj, b_j[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + r * stride + v * L, (VecF)sum[r][v]);
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA

#endif
