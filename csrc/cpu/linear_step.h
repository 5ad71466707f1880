// What becomes of a row before the products of a linear step, and of its outputs after them.
#pragma once

#include "cpu/activation.h"
#include "cpu/part.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class W, class Acc>
void normalise(const LinearStepArgs& a, Acc* x) {
  constexpr int L = kLanes<Acc>;
  const int64_t K = a.K;
  const bool centred = a.norm == StepNorm::kLayerNorm;
  Vec<Acc> sum = {};
  for (int64_t k = 0; k < K; k += L) sum += load(x + k);  // zeros beyond K
  const Acc mean = centred ? hsum(sum) / static_cast<Acc>(K) : Acc(0);
  Vec<Acc> squares = {};
  int64_t k = 0;
  for (; k + L <= K; k += L) {
    const Vec<Acc> d = load(x + k) - mean;
    squares += d * d;
  }
  Acc square = hsum(squares);
  for (; k < K; ++k) square += (x[k] - mean) * (x[k] - mean);
  const Acc scale =
      Acc(1) /
      static_cast<Acc>(__builtin_sqrt(static_cast<double>(square / static_cast<Acc>(K)) + a.eps));
  const W* weight = static_cast<const W*>(a.norm_weight);
  const W* bias = static_cast<const W*>(a.norm_bias);
  for (k = 0; k < K; k += L) {
    Vec<Acc> y = (load(x + k) - mean) * scale;
    if (weight) y *= load_part<Acc>(weight + k, K - k);
    if (bias) y += load_part<Acc>(bias + k, K - k);
    store_part<Acc>(x + k, y, K - k);
  }
}

// x [stride] = norm(x_n), zeros beyond K.
template <class T, class W>
void prepare_row(const LinearStepArgs& a, int64_t n, AccOf<T>* x, int64_t stride) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const T* from = static_cast<const T*>(a.x) + a.x_rows.offset(n);
  for (int64_t k = 0; k < stride; k += L) {
    store(x + k, k < a.K ? load_part<Acc>(from + k, a.K - k) : Vec<Acc>{});
  }
  if (a.norm != StepNorm::kNone) normalise<W>(a, x);
}

// Outputs of row n from m on, where there are `count`, of their products; `up`: the gated half's.
template <class T, class W>
SEQKERN_INLINE void complete(const LinearStepArgs& a, int64_t n, int64_t m, int count,
                             Vec<AccOf<T>> out, Vec<AccOf<T>> up) {
  using Acc = AccOf<T>;
  const W* bias = static_cast<const W*>(a.bias);
  if (bias) out += load_part<Acc>(bias + m, count);
  if (a.activation != Activation::kNone) out = activate<Acc>(a.activation, out);
  if (a.gated) {
    if (bias) up += load_part<Acc>(bias + a.M + m, count);
    out *= up;
  }
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + a.residual_rows.offset(n) + m;
    out += load_part<Acc>(residual, count);
  }
  store_part<Acc>(static_cast<T*>(a.y) + n * a.M + m, out, count);
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
