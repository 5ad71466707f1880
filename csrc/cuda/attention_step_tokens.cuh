// The new tokens of attention_step: their queries and keys rotated, keys and values into the cache.
#pragma once

#include "cuda/attention_step_runs.cuh"
#include "cuda/attention_step_tile.cuh"
#include "ops/attention_step.h"

namespace seqkern::cuda {

// Element d of x [D], of the token at position p, rotated.
template <class Acc, class T>
__device__ __forceinline__ Acc rotated(const AttentionStepArgs& a, const T* x, int d, int p) {
  const Acc mine = load1(x + d);
  if (!a.cos || d >= a.R) return mine;
  const int half = static_cast<int>(a.R) / 2;
  const int pair = a.interleaved ? d / 2 : d % half;
  const bool second = a.interleaved ? d % 2 != 0 : d >= half;
  const int distance = a.interleaved ? 1 : half;
  const Acc other = load1(x + (second ? d - distance : d + distance));
  const int64_t at = static_cast<int64_t>(p) * half + pair;
  const Acc cos = static_cast<Acc>(a.cos[at]), sin = static_cast<Acc>(a.sin[at]);
  return second ? mine * cos + other * sin : mine * cos - other * sin;
}

// New tokens that belong to this run, into the cache.
template <class T, class C>
__device__ void append(const AttentionStepArgs& a, const StepWork& w) {
  using Acc = AccOf<T>;
  const int D = static_cast<int>(a.D);
  for (int s = 0; s < w.tokens; ++s) {
    const int p = w.position + s;
    if (p < w.begin || p >= w.end) continue;
    const T* k = head_at<T>(a.k_new, a.k_new_strides, w.b, w.head, s);
    const T* v = head_at<T>(a.v_new, a.v_new_strides, w.b, w.head, s);
    C* k_to = head_at<C>(a.k_cache, a.k_cache_strides, w.b, w.head, p);
    C* v_to = head_at<C>(a.v_cache, a.v_cache_strides, w.b, w.head, p);
    for (int d = static_cast<int>(threadIdx.x); d < D; d += kStepThreads) {
      store1(k_to + d, rotated<Acc>(a, k, d, p));
      store1(v_to + d, static_cast<Acc>(load1(v + d)));
    }
  }
}

}  // namespace seqkern::cuda
