// The host emulator (tests): the CUDA kernels on CPU tensors.
#pragma once

#include "cuda/kernels.h"
#include "torch/check.h"
#include "torch/host_gemm.h"

namespace seqkern {

// Between them lie the accesses of an op's kernels to the memory of its tensors.
namespace emulator {
void begin_op();
void end_op();
}  // namespace emulator

struct Emulator {
  // As on CUDA.
  static bool mixed_gemm(DType) { return true; }
  static bool matrix_unit() { return true; }
  static constexpr bool kAddsMixedProducts = false;
  static constexpr bool kTiles = false;
  // As on CUDA, where targets cannot be looked at before the launch.
  static constexpr bool kHostReadable = false;

  // Whether w_ih x_t of an LSTM is one product before its kernel, not made by the kernel.
  static constexpr bool kInputProductFirst = true;
  static constexpr bool kRowsApart = false;

  struct Guard {
    explicit Guard(const Tensor&) { emulator::begin_op(); }
    ~Guard() { emulator::end_op(); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
  };

#define SEQKERN_RUN(name, Args) \
  static void run(const Args& args) { cuda::name(args, nullptr); }
  SEQKERN_CUDA_KERNELS(SEQKERN_RUN)
#undef SEQKERN_RUN

  // ATen on the CPU adds up rows of an index one by one in their own dtype; on CUDA in float and in
  // pieces, as exact as this.
  static Tensor for_row_sums(const Tensor& t) { return torch::stable::to(t, ScalarType::Double); }

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

  // out = a b (+ out). 16-bit operands are summed in float, as cuBLAS does, and rounded once where
  // the result is of 16 bits, too.
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
    const bool rounded = out.element_size() == 2;
    const ScalarType type = rounded ? ScalarType::Float : out.scalar_type();
    const auto cast = [&](const Tensor& t) { return torch::stable::to(t, type); };
    Tensor sum = cast(out), result = out;
    host_multiply(sum, cast(a), cast(b), accumulate);
    if (rounded) torch::stable::copy_(result, sum);
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

using Backend = Emulator;

}  // namespace seqkern
