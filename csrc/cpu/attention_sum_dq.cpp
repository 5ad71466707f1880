// Causal attention on the CPU, backward, where the keys of a head were more than one task: dq is
// the sum of what each task has made of it.
#include "cpu/attention.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// dq of kSumRows queries: the chunks' sums, in their order.
template <class T>
void sum_dq_rows(const AttentionBackwardArgs& a, const AttentionBackwardPlan& plan, int64_t task) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const AttentionInputs& in = a.in;
  const int64_t blocks = ceil_div(in.Tq, plan.kSumRows);
  const int64_t b = task / blocks / in.NH, h = task / blocks % in.NH;
  const int64_t i_first = task % blocks * plan.kSumRows;
  const AttentionRow row(in, b);
  const Acc* sums = static_cast<const Acc*>(a.workspace);
  for (int64_t i = i_first; i < least(i_first + plan.kSumRows, in.Tq); ++i) {
    T* to = at(static_cast<T*>(a.dq), a.dq_strides, b, h, i);
    const bool seen = i >= row.begin && i < row.end;
    const int64_t first = seen ? row.first_key(i) / plan.chunk : 0;
    const int64_t end = seen ? ceil_div(row.end_key(i), plan.chunk) : 0;
    for (int64_t d = 0; d < in.D; d += L) {
      Vec<Acc> sum = {};
      for (int64_t c = first; c < end; ++c) {
        sum += load(sums + (((c * in.B + b) * in.NH + h) * in.Tq + i) * plan.width + d);
      }
      store_part<Acc>(to + d, sum, in.D - d);
    }
  }
}

}  // namespace

void attention_sum_dq(const AttentionBackwardArgs& a, int64_t begin, int64_t end) {
  const AttentionBackwardPlan plan(a.in);
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    for (int64_t task = begin; task < end; ++task) {
      sum_dq_rows<typename decltype(tag)::type>(a, plan, task);
    }
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
