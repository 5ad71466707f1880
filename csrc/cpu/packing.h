// Numbers of a matrix as tiles read them: lines along k as vectors across units, and for the matrix
// unit (matrix_tiles.h) as pairs of k.
#pragma once

#include <type_traits>

#include "cpu/matrix_tiles.h"
#include "cpu/part.h"

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

SEQKERN_INLINE VecU32 load_numbers(const uint16_t* from, int64_t count) {
  VecU32 v = {};
  __builtin_memcpy(&v, from, count * sizeof(uint16_t));
  return v;
}

SEQKERN_INLINE VecU32 pairs_of(const uint16_t* even, const uint16_t* odd) {
  HalfBits e = {}, o = {};
  __builtin_memcpy(&e, even, sizeof(e));
  if (odd) __builtin_memcpy(&o, odd, sizeof(o));
  return widened(e) | (widened(o) << 16);
}

// A tile of the bf16 numbers (i, k) at from[i * stride + k * k_stride], zeros outside of [count,
// K]. Its words are pairs of k: kWordsOfRows has a row for each i, a tile's A, otherwise a row for
// each pair, a B.
template <bool kWordsOfRows>
void pack_tile(uint16_t* to, const uint16_t* from, int64_t stride, int64_t k_stride, int64_t count,
               int64_t K) {
  constexpr int L = kLanes<float>;
  VecU32 words[L];
  bool rows;  // whether words[i] is a row
  if (k_stride == 1) {
    rows = true;
    if (K >= kTileDepth && count >= L) [[likely]] {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) __builtin_memcpy(&words[i], from + i * stride, sizeof(words[i]));
    } else {
      for (int i = 0; i < L; ++i) {
        words[i] =
            i < count ? load_numbers(from + i * stride, K < kTileDepth ? K : kTileDepth) : VecU32{};
      }
    }
  } else if (stride == 1 && count >= L) {
    rows = false;
    if (K >= kTileDepth) [[likely]] {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        words[i] = pairs_of(from + 2 * i * k_stride, from + (2 * i + 1) * k_stride);
      }
    } else {
      for (int64_t i = 0; i < L; ++i) {
        const uint16_t* even = from + 2 * i * k_stride;
        words[i] = 2 * i < K ? pairs_of(even, 2 * i + 1 < K ? even + k_stride : nullptr) : VecU32{};
      }
    }
  } else {
    rows = true;
    for (int64_t i = 0; i < L; ++i) {
      uint16_t row[kTileDepth] = {};
      for (int64_t k = 0; i < count && k < K && k < kTileDepth; ++k) {
        row[k] = from[i * stride + k * k_stride];
      }
      words[i] = load_numbers(row, kTileDepth);
    }
  }
  if (rows != kWordsOfRows) transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) __builtin_memcpy(to + 2 * L * i, &words[i], sizeof(words[i]));
}

// A tile of each part, part_stride numbers apart, of columns [k, k + 32) and `count` units: element
// (j, i) at from[j * k_stride + i * i_stride], zeros outside of [K, count].
template <class T>
void pack_tiles(uint16_t* to, int64_t part_stride, const T* from, int64_t k_stride,
                int64_t i_stride, int64_t K, int64_t count) {
  constexpr int L = kLanes<float>;
  static_assert(!kHasTiles || L == 16);
  if constexpr (std::is_same_v<T, BFloat16>) {
    return pack_tile<false>(to, &from->bits, i_stride, k_stride, count, K);
  }
  for (int64_t first = 0; first < kTileDepth; first += L, to += L * L) {
    VecF v[L];  // of k = first + j
    if (k_stride == 1 && K - first >= L && count >= L) [[likely]] {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = load(from + i * i_stride + first);
      transpose(v);
    } else if (k_stride == 1 && i_stride != 1) {
      const int64_t rest = K - first, some = rest < 0 ? 0 : rest < L ? rest : L;
      for (int i = 0; i < L; ++i) {
        v[i] = i < count && some ? load_part<float>(from + i * i_stride + first, some) : VecF{};
      }
      transpose(v);
    } else {
      for (int64_t j = 0; j < L; ++j) {
        v[j] = VecF{};
        const T* line = from + (first + j) * k_stride;
        if (first + j >= K) continue;
        if (i_stride == 1) {
          v[j] = load_part<float>(line, count);
        } else {
          for (int64_t i = 0; i < count; ++i) v[j][i] = load1(line + i * i_stride);
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < L; j += 2) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts<T>; ++p) {
        const VecU32 pairs = (next_part(v[j]) >> 16) | next_part(v[j + 1]);
        __builtin_memcpy(to + p * part_stride + j * L, &pairs, sizeof(pairs));
      }
    }
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
