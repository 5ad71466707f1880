// Causal attention on the CPU, forward.
#include "cpu/attention.h"

#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
void forward_query(const AttentionForwardArgs& a, const AttentionRow& row, int64_t b, int64_t h,
                   int64_t i) {
  using Acc = AccOf<T>;
  const AttentionInputs& in = a.in;
  const Score<T> score(in, b, h);
  T* out = static_cast<T*>(a.out) + b * a.out_strides.b + h * a.out_strides.h + i * a.out_strides.t;
  Acc* lse = static_cast<Acc*>(a.lse) + (b * in.NH + h) * in.Tq + i;
  if (i < row.begin || i >= row.end) {
    for (int64_t d = 0; d < in.D; ++d) store1(out + d, Acc(0));
    *lse = -static_cast<Acc>(__builtin_inf());
    return;
  }
  const int64_t first = row.first_key(i), end = row.end_key(i);
  Acc m = -static_cast<Acc>(__builtin_inf());
  for (int64_t j = first; j < end; ++j) {
    const Acc s = score(i, j).value;
    m = s > m || s != s ? s : m;
  }
  Acc sum = 0, o[256] = {};
  for (int64_t j = first; j < end; ++j) {
    const Acc p = exp1(score(i, j).value - m);
    sum += p;
    const Acc kept = p * score.keep(i, j);
    for (int64_t d = 0; d < in.D; ++d) o[d] += kept * load1(score.v(j) + d);
  }
  for (int64_t d = 0; d < in.D; ++d) store1(out + d, o[d] / sum);
  *lse = m + log1(sum);
}

}  // namespace

void attention_forward(const AttentionForwardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t block = attention_query_block(a.in);
    const int64_t blocks = ceil_div(a.in.Tq, block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / a.in.NH, h = task / blocks % a.in.NH;
      const AttentionRow row(a.in, b);
      for (int64_t i = task % blocks * block; i < a.in.Tq && i < (task % blocks + 1) * block; ++i) {
        forward_query<T>(a, row, b, h, i);
      }
    }
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
