// The linear layer of a decoding step: rows are normalised once, then the weight is read once, in
// the order it lies in memory, a vector of outputs at a time for all rows. What bounds it is
// reading the weight.
#include "cpu/activation.h"
#include "cpu/dot.h"
#include "cpu/kernels.h"
#include "cpu/linear_step_plan.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kMostRows = 4;  // rows of x at a time, so many products share a load of the weight

// ---------------------------------------------------------------- normalising a row

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

template <class T, class W>
void prepare(const LinearStepArgs& a, const LinearStepPlan& plan, int64_t n) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const T* from = static_cast<const T*>(a.x) + a.x_rows.offset(n);
  Acc* x = static_cast<Acc*>(a.workspace) + n * plan.stride;
  for (int64_t k = 0; k < plan.stride; k += L) {
    store(x + k, k < a.K ? load_part<Acc>(from + k, a.K - k) : Vec<Acc>{});
  }
  if (a.norm != StepNorm::kNone) normalise<W>(a, x);
}

// ---------------------------------------------------------------- products

// out[r] = x_r . w_m for the kLanes rows m of a weight from `first` on, where there are `count`;
// those that are missing repeat the last.
template <int R, class W, class Acc>
SEQKERN_INLINE void project(const Acc* x, int64_t x_stride, const W* w, int64_t w_stride, int count,
                            int64_t K, Vec<Acc> (&out)[R]) {
  constexpr int L = kLanes<Acc>;
  // For one row of x the weight is one stream, which is what prefetchers follow best: half again as
  // fast with 16-bit weights as four rows of it side by side. More rows are bound by arithmetic.
  constexpr int kFit = kSums / (2 * R), kN = R == 1 ? 1 : kFit < L ? kFit : L;
  Vec<Acc> sum[R * L];
#pragma GCC unroll 4
  for (int first = 0; first < L; first += kN) {
    const W* row[kN];
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      const int m = first + i;
      row[i] = w + (m < count ? m : count - 1) * w_stride;
    }
    multiply_rows<kN, R, 2, 1, L>(x, x_stride, row, K, sum + first);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out[r] = hsums(sum + r * L);
}

// The kLanes outputs from m on, where there are `count`, of R rows from n on.
template <int R, class T, class W>
void make_outputs(const LinearStepArgs& a, const LinearStepPlan& plan, int64_t n, int64_t m,
                  int count) {
  using Acc = AccOf<T>;
  const Acc* x = static_cast<const Acc*>(a.workspace) + n * plan.stride;
  const W* weight = static_cast<const W*>(a.weight);
  const W* bias = static_cast<const W*>(a.bias);
  const auto linear = [&](int64_t from, Vec<Acc>(&out)[R]) __attribute__((always_inline)) {
    project<R>(x, plan.stride, weight + from * a.weight_stride, a.weight_stride, count, a.K, out);
    if (!bias) return;
    const Vec<Acc> b = load_part<Acc>(bias + from, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[r] += b;
  };
  Vec<Acc> out[R];
  linear(m, out);
  if (a.activation != Activation::kNone) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[r] = activate<Acc>(a.activation, out[r]);
  }
  if (a.gated) {
    Vec<Acc> up[R];
    linear(a.M + m, up);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[r] *= up[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + a.residual_rows.offset(n + r) + m;
      out[r] += load_part<Acc>(residual, count);
    }
    store_part<Acc>(static_cast<T*>(a.y) + (n + r) * a.M + m, out[r], count);
  }
}

template <class T, class W>
void run_group(const LinearStepArgs& a, const LinearStepPlan& plan, int64_t group) {
  constexpr int L = kLanes<AccOf<T>>;
  const int64_t begin = group * kStepOutputs;
  const int64_t end = begin + kStepOutputs < a.M ? begin + kStepOutputs : a.M;
  for (int64_t m = begin; m < end; m += L) {
    const int count = static_cast<int>(end - m < L ? end - m : L);
    // The rows of the weight are in cache for the rows of x after the first few.
    int64_t n = 0;
    for (; n + kMostRows <= a.N; n += kMostRows)
      make_outputs<kMostRows, T, W>(a, plan, n, m, count);
    if (n + 2 <= a.N) {
      make_outputs<2, T, W>(a, plan, n, m, count);
      n += 2;
    }
    if (n < a.N) make_outputs<1, T, W>(a, plan, n, m, count);
  }
}

}  // namespace

// Tasks: rows.
void linear_step_prepare(const LinearStepArgs& a, int64_t begin, int64_t end) {
  const LinearStepPlan plan(a);
  dispatch_mixed(a.dtype, a.weight_dtype, [&](auto tag, auto weight_tag) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    for (int64_t n = begin; n < end; ++n) prepare<T, W>(a, plan, n);
  });
}

// Tasks: groups of kStepOutputs outputs.
void linear_step(const LinearStepArgs& a, int64_t begin, int64_t end) {
  const LinearStepPlan plan(a);
  dispatch_mixed(a.dtype, a.weight_dtype, [&](auto tag, auto weight_tag) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    for (int64_t group = begin; group < end; ++group) run_group<T, W>(a, plan, group);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
