// CUDA: kernels run on torch's current stream of the tensors' device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kernels.h"
#include "torch/check.h"

// Declared by torch's headers only for files compiled with USE_CUDA; defined in libtorch_cuda.so.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);
extern "C" AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                 AtenTensorHandle mat2);
extern "C" AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                    AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                    double beta, double alpha);

namespace seqkern {

struct Cuda {
  // Tensor cores take 16-bit operands and sum in float; a GEMM is large, and there is one tile.
  static bool mixed_gemm(DType) { return true; }
  static bool matrix_unit() { return true; }
  static constexpr bool kAddsMixedProducts = false;
  static constexpr bool kTiles = false;
  // A look at the targets would wait for the device; kernels answer a bad one with NaN.
  static constexpr bool kHostReadable = false;

  // Whether w_ih x_t of an LSTM is one product before its kernel, not made by the kernel.
  static constexpr bool kInputProductFirst = true;
  static constexpr bool kRowsApart = false;

  // The device of the op's tensors is current while this lives, and the earlier one afterwards.
  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  static cuda::Stream current_stream() {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(
        torch::stable::accelerator::getCurrentDeviceIndex(), &stream));
    return static_cast<cuda::Stream>(stream);
  }

#define SEQKERN_RUN(name, Args) \
  static void run(const Args& args) { cuda::name(args, current_stream()); }
  SEQKERN_CUDA_KERNELS(SEQKERN_RUN)
#undef SEQKERN_RUN

  // Rows that ATen is to add up by an index: it does so in float, in pieces.
  static Tensor for_row_sums(const Tensor& t) { return t; }

  static int64_t workspace_bytes(const LstmForwardArgs& a) {
    return cuda::lstm_forward_workspace(a);
  }
  static int64_t workspace_bytes(const LstmBackwardArgs& a) {
    return cuda::lstm_backward_workspace(a);
  }
  static int64_t workspace_bytes(const HiddenForwardArgs& a) {
    return cuda::hidden_forward_workspace(a);
  }
  static int64_t workspace_bytes(const HiddenBackwardArgs& a) {
    return cuda::hidden_backward_workspace(a);
  }

  // out = a b (+ out). A product of 16-bit operands into float memory cannot be added to it.
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
    if (a.scalar_type() == out.scalar_type()) {
      TORCH_ERROR_CODE_CHECK(
          accumulate ? aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                     : aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
      return;
    }
    if (accumulate) throw std::logic_error("multiply: operands of another dtype cannot be added");
    StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                            torch::stable::detail::from(out.scalar_type()),
                            torch::stable::detail::from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack, TORCH_ABI_VERSION));
    static_cast<void>(torch::stable::detail::to<Tensor>(stack[0]));
  }

  static int64_t workspace_bytes(const AttentionForwardArgs& args) {
    return cuda::attention_forward_workspace(args);
  }
  static int64_t workspace_bytes(const AttentionBackwardArgs& args) {
    return cuda::attention_backward_workspace(args);
  }

  static int64_t workspace_bytes(const AttentionStepArgs& args) {
    return cuda::attention_step_workspace(args);
  }

  static int64_t workspace_bytes(const SampleArgs& args) { return cuda::sample_workspace(args); }

  static int64_t workspace_bytes(const LinearStepArgs& args) {
    return cuda::linear_step_workspace(args);
  }

  static void before_first_write(const Tensor&) {}
};

using Backend = Cuda;

}  // namespace seqkern
