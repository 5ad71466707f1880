// The host emulator (tests): the CUDA kernels on CPU tensors.
#pragma once

#include "cuda/kernels.h"
#include "torch/check.h"

namespace seqkern {

struct Emulator {
  // As on CUDA, where targets cannot be looked at before the launch.
  static constexpr bool kHostReadable = false;

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

#define SEQKERN_RUN(name, Args) \
  static void run(const Args& args) { cuda::name(args, nullptr); }
  SEQKERN_CUDA_KERNELS(SEQKERN_RUN)
#undef SEQKERN_RUN

  static int64_t workspace_bytes(const AttentionStepArgs& args) {
    return cuda::attention_step_workspace(args);
  }

  static void before_first_write(const Tensor&) {}
};

using Backend = Emulator;

}  // namespace seqkern
