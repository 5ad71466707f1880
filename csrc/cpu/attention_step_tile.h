// What a step of attention does with a tile of the cache: products of K with a few query rows,
// their softmax, products with V. The scores of a tile lie as [keys, R]: the softmax of R rows is
// then one of whole vectors, and the weights of a key are neighbours.
#pragma once

#include "cpu/dot.h"
#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kTile = 32;  // keys whose scores are made before they are used: K, then V, of these
// Query rows at a time, so many products share a load of the cache: at most a vector has lanes.
template <class Acc>
constexpr int kMostRows = kLanes<Acc> < 4 ? kLanes<Acc> : 4;

// Into the second-level cache: what is needed a tile later would push the first level's out.
template <class C>
SEQKERN_INLINE void prefetch_row(const C* x, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(C);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(x + d, 0, 2);
}

// ---------------------------------------------------------------- K

// scores[key R + r] = q_r . k_key of n keys; as many more as fill the last vector are repeated from
// the last key. The heads `ahead`, of the same stride, are announced as the keys are read.
template <int R, class C, class Acc>
SEQKERN_INLINE void make_scores(const Acc* q, int64_t q_stride, const C* k, int64_t k_stride, int n,
                                int64_t D, const C* ahead, int64_t ahead_stride, Acc* scores) {
  constexpr int kGroup = kLanes<Acc> / R;  // keys of a vector of scores
  constexpr int kAtOnce = kSums / R < 4 ? kSums / R : 4;
  constexpr int kN = kAtOnce < kGroup ? kAtOnce : kGroup;
  for (int first = 0; first < n; first += kGroup) {
    Vec<Acc> sum[kLanes<Acc>];
#pragma GCC unroll 4
    for (int some = 0; some < kGroup; some += kN) {
      const C* key[kN];
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) {
        const int at = first + some + i;
        key[i] = k + (at < n ? at : n - 1) * k_stride;
        if (ahead && at < n) prefetch_row(ahead + at * ahead_stride, D);
      }
      multiply_rows<kN, R>(q, q_stride, key, D, sum + some * R);
    }
    store(scores + first * R, hsums(sum));
  }
}

// ---------------------------------------------------------------- softmax

// Of R rows, lane i belonging to row i % R.
template <int R, class Acc>
struct RowStates {
  alignas(64) Acc max[kLanes<Acc>];  // -inf before a key is seen
  alignas(64) Acc sum[kLanes<Acc>];  // of a row: those of its lanes

  RowStates() {
    for (int i = 0; i < kLanes<Acc>; ++i) {
      max[i] = -static_cast<Acc>(__builtin_inf());
      sum[i] = 0;
    }
  }
  Acc row_sum(int r) const {
    Acc total = 0;
    for (int i = r; i < kLanes<Acc>; i += R) total += sum[i];
    return total;
  }
};

// Turns scores [count], whole vectors, into exp(x - max), and the outputs to the new maxima. Those
// of keys not seen are -inf.
template <int R, class Acc>
SEQKERN_INLINE void softmax_tile(Acc* scores, int count, RowStates<R, Acc>& state, Acc* out,
                                 int64_t out_stride, int64_t D) {
  constexpr int L = kLanes<Acc>;
  constexpr Acc kNothing = -static_cast<Acc>(__builtin_inf());
  Vec<Acc> largest = load(scores);
  for (int i = L; i < count; i += L) largest = vmax(load(scores + i), largest);
  alignas(64) Acc tile_max[L];
  store(tile_max, max_every<R>(largest));
  for (int r = 0; r < R; ++r) {
    if (!(tile_max[r] > state.max[r])) continue;
    const Acc factor = state.max[r] == kNothing ? Acc(0) : exp1(state.max[r] - tile_max[r]);
    for (int64_t d = 0; d < D; d += L) {
      store(out + r * out_stride + d, load(out + r * out_stride + d) * factor);
    }
    for (int i = r; i < L; i += R) {
      state.sum[i] *= factor;
      state.max[i] = tile_max[r];
    }
  }
  // A row that sees no key yet: -inf - 0, where -inf - -inf would be NaN.
  const Vec<Acc> max = load(state.max);
  const Vec<Acc> shift = select(max == kNothing, Vec<Acc>{}, max);
  Vec<Acc> sum = load(state.sum);
  for (int i = 0; i < count; i += L) {
    const Vec<Acc> p = exp_nonpositive<Acc>(load(scores + i) - shift);
    store(scores + i, p);
    sum += p;
  }
  store(state.sum, sum);
}

// ---------------------------------------------------------------- V

// out_r += sum_key p[key R + r] v_key for n keys, over kColumns vectors from d, which stay in
// registers; a last vector that the head does not fill is read as far as it goes.
template <int R, int kColumns, bool kWhole, class C, class Acc>
SEQKERN_INLINE void add_columns(const Acc* p, const C* v, int64_t v_stride, int n, int64_t d,
                                int64_t D, const C* ahead, int64_t ahead_stride, Acc* out,
                                int64_t out_stride) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> sum[R][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[r][c] = load(out + r * out_stride + d + c * L);
  }
  for (int key = 0; key < n; ++key) {
    if (ahead) prefetch_row(ahead + key * ahead_stride, D);
    const C* from = v + key * v_stride;
    Vec<Acc> value[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (kWhole) {
        value[c] = load(from + d + c * L);
      } else {
        value[c] = load_part<Acc>(from + d + c * L, D - d - c * L);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<Acc> weight = splat<Vec<Acc>>(p[key * R + r]);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] += weight * value[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(out + r * out_stride + d + c * L, sum[r][c]);
  }
}

// The columns from d on. The heads `ahead` are announced during the first pass over the keys.
template <int R, int kColumns, class C, class Acc>
SEQKERN_INLINE void add_values(const Acc* p, const C* v, int64_t v_stride, int n, int64_t d,
                               int64_t D, const C* ahead, int64_t ahead_stride, Acc* out,
                               int64_t out_stride) {
  constexpr int64_t kWidth = kColumns * kLanes<Acc>;
  for (; d + kWidth <= D; d += kWidth, ahead = nullptr) {
    add_columns<R, kColumns, true>(p, v, v_stride, n, d, D, ahead, ahead_stride, out, out_stride);
  }
  if (d == D) return;
  if constexpr (kColumns > 1) {
    add_values<R, kColumns / 2>(p, v, v_stride, n, d, D, ahead, ahead_stride, out, out_stride);
  } else {
    add_columns<R, 1, false>(p, v, v_stride, n, d, D, ahead, ahead_stride, out, out_stride);
  }
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
