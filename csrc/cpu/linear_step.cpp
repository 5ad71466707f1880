// The linear layer of a decoding step: rows are normalised once, then the weight is read once, in
// the order it lies in memory, a vector of outputs at a time for all rows. What bounds it is
// reading the weight.
#include "cpu/linear_step.h"

#include "cpu/dot.h"
#include "cpu/kernels.h"
#include "cpu/linear_step_plan.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Rows of x and of a weight whose products are in registers.
constexpr int kMostRows = 6;
constexpr int kWeightRows = kManyRegisters ? 4 : 2;
// Vectors of inputs at a time, so that a few rows of x stay in first-level cache: an even number.
constexpr int64_t kPart = 3072 / kVectorBytes;
// Of a weight, that are asked for before they are read: memory's latency times its rate.
constexpr int64_t kAheadBytes = 8 << 10;

// ---------------------------------------------------------------- products

// The kLanes rows of a weight that make a vector of outputs, or those of them that there are: the
// others repeat the last.
template <class W>
struct WeightRows {
  const W* first;
  int64_t stride;
  int count;

  const W* operator[](int i) const { return first + (i < count ? i : count - 1) * stride; }
};

// sum [R, kN] (+)= every second vector of x_r * w_n from d to `end`, lane by lane, and of the last
// `rest` elements, fewer than a vector. What lies `ahead` of the weight is asked for, unless zero.
template <int R, int kN, class W, class Acc>
SEQKERN_INLINE void add_products(const Acc* x, int64_t x_stride, const W* const (&w)[kN],
                                 int64_t ahead, int64_t d, int64_t end, int64_t rest, bool add,
                                 Vec<Acc>* sum) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> part[R][kN];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) part[r][n] = add ? sum[r * L + n] : Vec<Acc>{};
  }
  const auto step = [&](int64_t at, auto load_w) __attribute__((always_inline)) {
    Vec<Acc> of_w[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) of_w[n] = load_w(w[n] + at);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec<Acc> of_x = in_register(load(x + r * x_stride + at));
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) part[r][n] += of_x * of_w[n];
    }
  };
  for (; d < end; d += 2 * L) {
    if (ahead) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        __builtin_prefetch(w[n] + ahead + d, 0, 2);
        if (L * sizeof(W) == 64) __builtin_prefetch(w[n] + ahead + d + L, 0, 2);
      }
    }
    step(d, [](const W* from) __attribute__((always_inline)) { return load(from); });
  }
  if (rest > 0) {
    step(end,
         [&](const W* from) __attribute__((always_inline)) { return load_part<Acc>(from, rest); });
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sum[r * L + n] = part[r][n];
  }
}

// sum [R, L] of R rows. The sums of even vectors of inputs and those of odd ones are made one after
// the other, for which there are registers, and in the same order for any R. Of the rows of a
// weight that lie side by side no hardware foresees the next: the first to read them asks for
// those.
template <int R, class W, class Acc>
SEQKERN_INLINE void multiply(const Acc* x, int64_t x_stride, const WeightRows<W>& w, int64_t K,
                             bool first_reader, Vec<Acc>* sum) {
  constexpr int L = kLanes<Acc>, kN = kWeightRows < L ? kWeightRows : L;
  Vec<Acc> odd[R * L];
  const int64_t whole = K / L * L, rows = kAheadBytes / (K * int64_t{sizeof(W)});
  const int64_t ahead = first_reader ? (rows > kN ? rows : kN) * w.stride : 0;
  for (int64_t d = 0; d == 0 || d < whole; d += kPart * L) {
    const int64_t end = whole - d < kPart * L ? whole : d + kPart * L;
    const int64_t rest = end == whole ? K - whole : 0;
    for (int first = 0; first < L; first += kN) {
      const W* row[kN];
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) row[i] = w[first + i];
      add_products<R, kN>(x, x_stride, row, ahead, d, end, rest, d > 0, sum + first);
      add_products<R, kN>(x, x_stride, row, 0, d + L, end, 0, d > 0, odd + first);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * L; ++i) sum[i] += odd[i];
}

// The kLanes outputs from m on, where there are `count`, of R rows from n on.
template <int R, class T, class W>
void make_outputs(const LinearStepArgs& a, const LinearStepPlan& plan, int64_t n, int64_t m,
                  int count) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const Acc* x = static_cast<const Acc*>(a.workspace) + n * plan.stride;
  const auto linear = [&](int64_t from, Vec<Acc>(&out)[R]) __attribute__((always_inline)) {
    const W* weight = static_cast<const W*>(a.weight) + from * a.weight_stride;
    const WeightRows<W> w{weight, a.weight_stride, count};
    Vec<Acc> sum[R * L];
    multiply<R>(x, plan.stride, w, a.K, n == 0, sum);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) out[r] = hsums(sum + r * L);
  };
  Vec<Acc> out[R], up[R] = {};
  linear(m, out);
  if (a.gated) linear(a.M + m, up);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) complete<T, W>(a, n + r, m, count, out[r], up[r]);
}

// Rows to take at a time of those that are left.
SEQKERN_INLINE int rows_of(int64_t left) {
  if (left >= kMostRows && left != 8) return kMostRows;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class T, class W>
void run_group(const LinearStepArgs& a, const LinearStepPlan& plan, int64_t group) {
  constexpr int L = kLanes<AccOf<T>>;
  const int64_t begin = group * kStepOutputs;
  const int64_t end = begin + kStepOutputs < a.M ? begin + kStepOutputs : a.M;
  for (int64_t m = begin; m < end; m += L) {
    const int count = static_cast<int>(end - m < L ? end - m : L);
    // The rows of the weight are in cache for the rows of x after the first few.
    for (int64_t n = 0; n < a.N;) {
      const int rows = rows_of(a.N - n);
      if (rows == kMostRows) {
        make_outputs<kMostRows, T, W>(a, plan, n, m, count);
      } else if (rows == 4) {
        make_outputs<4, T, W>(a, plan, n, m, count);
      } else if (rows == 2) {
        make_outputs<2, T, W>(a, plan, n, m, count);
      } else {
        make_outputs<1, T, W>(a, plan, n, m, count);
      }
      n += rows;
    }
  }
}

}  // namespace

// Tasks: rows.
void linear_step_prepare(const LinearStepArgs& a, int64_t begin, int64_t end) {
  const LinearStepPlan plan(a);
  dispatch_mixed(a.dtype, a.weight_dtype, [&](auto tag, auto weight_tag) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    auto* rows = static_cast<AccOf<T>*>(a.workspace);
    for (int64_t n = begin; n < end; ++n) {
      prepare_row<T, W>(a, n, rows + n * plan.stride, plan.stride);
    }
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
