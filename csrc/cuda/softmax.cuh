// The online softmax of a row, and what a row's target says.
#pragma once

#include "cuda/block.cuh"
#include "cuda/math.cuh"

namespace seqkern::cuda {

// What the class index of row n says; without indices (class probabilities) neither ignored nor a
// class.
struct Target {
  Target() = default;
  __device__ Target(const int64_t* target, int64_t ignore_index, int64_t V, int64_t n) {
    if (!target) return;
    const int64_t y = target[n];
    ignored = y == ignore_index;
    const bool in_range = static_cast<uint64_t>(y) < static_cast<uint64_t>(V);
    // An ignored row may name a class too (ignore_index = 0), but nothing is taken from it.
    if (in_range && !ignored) v = static_cast<int>(y);
    invalid = !in_range && !ignored;
  }
  bool ignored = false;
  bool invalid = false;
  int v = -1;
};

// ---------------------------------------------------------------- online softmax

template <class Acc>
struct Add {
  __device__ __forceinline__ Acc operator()(Acc a, Acc b) const { return a + b; }
};

// Of the elements seen: m = max x, sum = sum exp(x - m).
template <class Acc, bool kTargetSums>
struct RowState {
  Acc max = lowest<Acc>();
  Acc sum = 0;
};

// And mass = sum w q, dot = sum w q (x - m): relative to m, so that the row's loss mass log(sum) -
// dot adds terms of one sign where all logits are far from zero.
template <class Acc>
struct RowState<Acc, true> {
  Acc max = lowest<Acc>();
  Acc sum = 0;
  Acc mass = 0;
  Acc dot = 0;
};

template <class Acc, bool kTargetSums>
__device__ __forceinline__ RowState<Acc, kTargetSums> shuffle_down(RowState<Acc, kTargetSums> s,
                                                                   int delta) {
  s.max = cuda::shuffle_down(s.max, delta);
  s.sum = cuda::shuffle_down(s.sum, delta);
  if constexpr (kTargetSums) {
    s.mass = cuda::shuffle_down(s.mass, delta);
    s.dot = cuda::shuffle_down(s.dot, delta);
  }
  return s;
}

template <class Acc, bool kTargetSums>
__device__ __forceinline__ RowState<Acc, kTargetSums> broadcast(RowState<Acc, kTargetSums> s) {
  s.max = cuda::broadcast(s.max);
  s.sum = cuda::broadcast(s.sum);
  if constexpr (kTargetSums) {
    s.mass = cuda::broadcast(s.mass);
    s.dot = cuda::broadcast(s.dot);
  }
  return s;
}

// The same sums about another maximum m >= s.max.
template <class Acc, bool kTargetSums>
__device__ __forceinline__ void move_to(RowState<Acc, kTargetSums>& s, Acc m) {
  s.sum *= softmax_exp(s.max - m);
  if constexpr (kTargetSums) {
    // Nothing seen yet: lowest - m may be infinite, and 0 times that is not 0.
    if (s.mass != 0) s.dot += s.mass * (s.max - m);
  }
  s.max = m;
}

struct MergeRows {
  template <class State>
  __device__ __forceinline__ State operator()(State a, State b) const {
    const auto m = max_of(a.max, b.max);
    move_to(a, m);
    move_to(b, m);
    a.sum += b.sum;
    if constexpr (requires { a.mass; }) {
      a.mass += b.mass;
      a.dot += b.dot;
    }
    return a;
  }
};

}  // namespace seqkern::cuda
