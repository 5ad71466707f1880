// GEMMs on CPU tensors through torch's BLAS.
//
// By the C shim, not the dispatcher: that one cannot pass addmm's scalars through the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

namespace seqkern {

// out = a b (+ out), all of one dtype.
inline void host_multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                          const torch::stable::Tensor& b, bool accumulate) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                 : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace seqkern
