// Rows of a table looked up by number, and the gradient of the table.
#pragma once

#include <vector>

#include "torch/backend.h"

namespace seqkern {

// out [N, W] = table[ids], ids int64 [N].
inline void look_up_into(const Tensor& table, const Tensor& ids, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(table),
                          torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(ids),
                          torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "out", stack, TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the same as `out`, and ours to release
}

#if defined(SEQKERN_BACKEND_CPU)
// out [V, W] = sum over n with ids[n] = v of a [N, W] (+ out).
inline void embedding_gradient_into(const Tensor& a, const int64_t* ids, const Tensor& out,
                                    bool accumulate) {
  const int64_t N = a.size(0), V = out.size(0);
  std::vector<int64_t> order(static_cast<size_t>(N)), first(static_cast<size_t>(V) + 1);
  for (int64_t n = 0; n < N; ++n) ++first[static_cast<size_t>(ids[n]) + 1];
  for (size_t v = 0; v < static_cast<size_t>(V); ++v) first[v + 1] += first[v];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t n = 0; n < N; ++n) {
    order[static_cast<size_t>(next[static_cast<size_t>(ids[n])]++)] = n;
  }
  Backend::run(cpu::EmbeddingGradientArgs{.dtype = float_dtype(a, "embedding_gradient", "a"),
                                          .N = N,
                                          .W = a.size(1),
                                          .V = V,
                                          .a = a.const_data_ptr(),
                                          .a_stride = a.stride(0),
                                          .order = order.data(),
                                          .first = first.data(),
                                          .out = out.mutable_data_ptr(),
                                          .accumulate = accumulate});
}
#endif

// sum over n with ids[n] = v of a [N, W], as [V, W].
inline Tensor embedding_gradient(const Tensor& a, const Tensor& ids, int64_t V) {
#if defined(SEQKERN_BACKEND_CPU)
  const Tensor out = empty_on(a, Sizes({V, a.size(1)}), a.scalar_type());
  Backend::before_first_write(out);
  embedding_gradient_into(a, static_cast<const int64_t*>(ids.const_data_ptr()), out, false);
  return out;
#else
  const Tensor summed = Backend::for_row_sums(a);
  StableIValue stack[] = {torch::stable::detail::from(summed), torch::stable::detail::from(ids),
                          torch::stable::detail::from(V), torch::stable::detail::from(int64_t{-1}),
                          torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::embedding_dense_backward", "", stack, TORCH_ABI_VERSION));
  const Tensor out = torch::stable::detail::to<Tensor>(stack[0]);
  return out.scalar_type() == a.scalar_type() ? out : torch::stable::to(out, a.scalar_type());
#endif
}

}  // namespace seqkern
