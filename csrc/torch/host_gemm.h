// GEMMs on CPU tensors through torch's BLAS.
//
// By the C shim, not the dispatcher: that one cannot pass addmm's scalars through the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace seqkern {

// out = a b (+ out), all of one dtype.
inline void host_multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                          const torch::stable::Tensor& b, bool accumulate) {
  if (out.size(0) == 1 && out.size(1) == 1) {
    // Of one row and one column torch takes its matrix product, whose single sum is long; the other
    // way round it takes a dot product, which adds up in many lanes.
    const auto t = [](const torch::stable::Tensor& x) { return torch::stable::transpose(x, 0, 1); };
    const torch::stable::Tensor out_t = t(out), a_t = t(a), b_t = t(b);
    TORCH_ERROR_CODE_CHECK(accumulate ? aoti_torch_cpu_addmm_out(out_t.get(), out_t.get(),
                                                                 b_t.get(), a_t.get(), 1.0, 1.0)
                                      : aoti_torch_cpu_mm_out(out_t.get(), b_t.get(), a_t.get()));
    return;
  }
  TORCH_ERROR_CODE_CHECK(
      accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                 : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace seqkern
