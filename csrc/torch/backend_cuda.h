// CUDA: kernels run on torch's current stream of the tensors' device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#include "torch/check.h"

// Declared by torch's headers only for files compiled with USE_CUDA; defined in libtorch_cuda.so.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);

namespace seqkern {

struct Cuda {
  // A look at the targets would wait for the device; kernels answer a bad one with NaN.
  static constexpr bool kHostReadable = false;

  // The device of the op's tensors is current while this lives, and the earlier one afterwards.
  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  static cuda::Stream current_stream() {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(
        torch::stable::accelerator::getCurrentDeviceIndex(), &stream));
    return static_cast<cuda::Stream>(stream);
  }

#define SEQKERN_RUN(name, Args) \
  static void run(const Args& args) { cuda::name(args, current_stream()); }
  SEQKERN_CUDA_KERNELS(SEQKERN_RUN)
#undef SEQKERN_RUN

  static int64_t workspace_bytes(const AttentionStepArgs& args) {
    return cuda::attention_step_workspace(args);
  }

  static void before_first_write(const Tensor&) {}
};

using Backend = Cuda;

}  // namespace seqkern
