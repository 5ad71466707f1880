// Softmax-cross-entropy on the CPU, forward: one pass over a row in blocks that stay in L1, so that
// the logits are read from memory once.
#include "cpu/cross_entropy.h"

#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Rows this short are taken four at a time: one row is a chain of maximum, exponentials, sum and
// logarithm in which each waits for the one before.
constexpr int64_t kShortRow = 128;
constexpr int kShortRows = 4;

template <class T, bool kCap>
void forward_short_rows(const CrossEntropyForwardArgs& a, int64_t n) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  const Options<Acc> o(in);
  const T* logits = static_cast<const T*>(in.logits);
  const int64_t padded = (in.V + L - 1) / L * L;
  alignas(64) Acc buffer[kShortRows][kShortRow];
  const Acc* x[kShortRows];
  // Four variables, not an array: an array is zeroed in memory by a string instruction, a tenth of
  // the time of a row of 16.
  Online<Acc> first, second, third, fourth;
  const auto each_row = [&](auto f) __attribute__((always_inline)) {
    f(0, first), f(1, second), f(2, third), f(3, fourth);
  };
#pragma GCC unroll 8
  for (int r = 0; r < kShortRows; ++r) {
    x[r] = stage<T, Acc, kCap>(logits + in.logits_rows.offset(n + r), in.V, o.softcap,
                               -static_cast<Acc>(__builtin_inf()), buffer[r]);
  }
  each_row([&](int r, Online<Acc>& row)
               __attribute__((always_inline)) { row.raise_max(x[r], padded); });
  each_row([&](int r, Online<Acc>& row)
               __attribute__((always_inline)) { row.add_exponentials(x[r], padded); });
  each_row([&](int r, Online<Acc>& row) __attribute__((always_inline)) {
    const bool has_class = in.target && !ignores(in, n + r);
    const Acc x_y = has_class ? x[r][in.target[n + r]] : Acc(0);
    finish_row(a, o, n + r, row.max, row.log_sum(), x_y, Acc(0));
  });
}

template <class T, bool kCap, bool kTargetSums>
void forward_rows(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  const Options<Acc> o(in);
  const T* logits = static_cast<const T*>(in.logits);
  const T* probs = static_cast<const T*>(in.target_probs);
  alignas(64) Acc x_buffer[kBlock];
  alignas(64) Acc p_buffer[kBlock];
  const Acc keep = probs ? Acc(1) - o.smoothing : Acc(0);
  const Acc uniform = o.smoothing / static_cast<Acc>(in.V);

  int64_t n = begin;
  if (!kTargetSums && in.V <= kShortRow) {
    for (; n + kShortRows <= end; n += kShortRows) forward_short_rows<T, kCap>(a, n);
  }
  for (; n < end; ++n) {
    if (ignores(in, n) && !a.lse) {
      finish_row(a, o, n, Acc(0), Acc(0), Acc(0), Acc(0));
      continue;
    }
    const int64_t y = in.target ? in.target[n] : -1;
    const T* x_n = logits + in.logits_rows.offset(n);
    const T* p_n = probs ? probs + in.target_probs_rows.offset(n) : nullptr;
    Online<Acc> online;
    TargetSums<Acc> sums;
    Acc x_y = 0;
    for (int64_t v = 0; v < in.V; v += kBlock) {
      const int64_t len = in.V - v < kBlock ? in.V - v : kBlock;
      const Acc* x = stage<T, Acc, kCap>(x_n + v, len, o.softcap,
                                         -static_cast<Acc>(__builtin_inf()), x_buffer);
      // Taken from the staged block, not capped anew: the same bits as in the sum.
      if (y >= v && y < v + len) x_y = x[y - v];
      online.add(x, (len + L - 1) / L * L);
      if constexpr (kTargetSums) {
        if (v == 0) sums.shift = online.max;
        const Acc* p = p_n ? stage<T, Acc, false>(p_n + v, len, Acc(0), Acc(0), p_buffer) : nullptr;
        add_targets(sums, x, p, o.weight ? o.weight + v : nullptr, keep, uniform, len);
      }
    }
    const Acc log_sum = online.log_sum();
    Acc extra = 0;
    if constexpr (kTargetSums) {
      extra = sums.mass * (log_sum + (online.max - sums.shift)) - sums.logits;
    }
    finish_row(a, o, n, online.max, log_sum, x_y, extra);
  }
}

// ---------------------------------------------------------------- reduce

template <class Acc>
void reduce(const CrossEntropyReduceArgs& a) {
  const Options<Acc> o(a.in);
  const Acc* row_loss = static_cast<const Acc*>(a.row_loss);
  const Acc* row_max = static_cast<const Acc*>(a.row_max);
  const Acc* row_log_sum = static_cast<const Acc*>(a.row_log_sum);
  double ce = 0, z = 0, weight = 0;
  int64_t count = 0;
  if (a.in.z_loss == 0 && !(a.in.target && o.weight)) {
    // The common case, in vectors, of as many lanes for every instruction set: the order of a sum
    // is part of its result. Ignored rows have loss 0.
    constexpr int kParts = 16;
    double part[kParts] = {};
    int64_t ignored[kParts] = {}, n = 0;
    for (; n + kParts <= a.in.N; n += kParts) {
      for (int i = 0; i < kParts; ++i) part[i] += row_loss[n + i];
      for (int i = 0; a.in.target && i < kParts; ++i) {
        ignored[i] += a.in.target[n + i] == a.in.ignore_index;
      }
    }
    for (; n < a.in.N; ++n) {
      part[n % kParts] += row_loss[n];
      ignored[n % kParts] += ignores(a.in, n);
    }
    count = a.in.N;
    for (int i = 0; i < kParts; ++i) ce += part[i], count -= ignored[i];
    weight = static_cast<double>(count);
  } else {
    for (int64_t n = 0; n < a.in.N; ++n) {
      if (ignores(a.in, n)) continue;
      ce += row_loss[n];
      const double lse = static_cast<double>(row_max[n]) + row_log_sum[n];
      z += lse * lse;
      weight += a.in.target ? o.weight_of(a.in.target[n]) : Acc(1);
      ++count;
    }
  }
  const bool mean = a.reduction == Reduction::kMean;
  const double ce_norm = mean ? 1.0 / weight : 1.0;
  const double z_norm = mean ? 1.0 / static_cast<double>(count) : 1.0;
  Acc* norm = static_cast<Acc*>(a.norm);
  norm[0] = static_cast<Acc>(ce_norm);
  norm[1] = static_cast<Acc>(z_norm);
  // Without z_loss its term is left out, not multiplied by zero: an infinite lse would make it NaN.
  const double loss = mean ? ce / weight : ce;
  *static_cast<Acc*>(a.loss) =
      static_cast<Acc>(a.in.z_loss == 0 ? loss : loss + a.in.z_loss * z * z_norm);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end) {
  if (forward_of_few(a, begin, end)) return;
  if (a.in.side) return forward_columns(a, begin, end);
  specialize(a.in, [&](auto tag, auto cap, auto sums) {
    forward_rows<typename decltype(tag)::type, cap.value, sums.value>(a, begin, end);
  });
}

void cross_entropy_reduce(const CrossEntropyReduceArgs& a, int64_t, int64_t) {
  a.in.dtype == DType::kFloat64 ? reduce<double>(a) : reduce<float>(a);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
