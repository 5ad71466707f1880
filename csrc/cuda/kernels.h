// Every CUDA entry point, once. Plain pointers to device memory in, results written; no allocation,
// no synchronisation. A failed launch throws std::runtime_error.
#pragma once

#include <cstdint>

#include "ops/attention.h"
#include "ops/attention_step.h"
#include "ops/cross_entropy.h"
#include "ops/gru_rnn.h"
#include "ops/linear_cross_entropy.h"
#include "ops/linear_step.h"
#include "ops/lstm.h"
#include "ops/sample.h"
#include "ops/softmax.h"

struct CUstream_st;

namespace seqkern::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

// X(function, Args)
#define SEQKERN_CUDA_KERNELS(X)                                    \
  X(cross_entropy_forward, CrossEntropyForwardArgs)                \
  X(cross_entropy_reduce, CrossEntropyReduceArgs)                  \
  X(cross_entropy_backward, CrossEntropyBackwardArgs)              \
  X(lstm_forward, LstmForwardArgs)                                 \
  X(lstm_backward, LstmBackwardArgs)                               \
  X(lstm_cell_forward, LstmCellForwardArgs)                        \
  X(lstm_cell_backward, LstmCellBackwardArgs)                      \
  X(hidden_cell_forward, HiddenCellForwardArgs)                    \
  X(hidden_cell_backward, HiddenCellBackwardArgs)                  \
  X(hidden_forward, HiddenForwardArgs)                             \
  X(hidden_backward, HiddenBackwardArgs)                           \
  X(sample, SampleArgs)                                            \
  X(softmax_forward, SoftmaxForwardArgs)                           \
  X(softmax_backward, SoftmaxBackwardArgs)                         \
  X(linear_cross_entropy_state, LinearCrossEntropyStateArgs)       \
  X(linear_cross_entropy_finish, LinearCrossEntropyFinishArgs)     \
  X(linear_cross_entropy_gradient, LinearCrossEntropyGradientArgs) \
  X(linear_cross_entropy_column_sums, ColumnSumsArgs)              \
  X(accumulate, AccumulateArgs)                                    \
  X(attention_forward, AttentionForwardArgs)                       \
  X(attention_backward, AttentionBackwardArgs)                     \
  X(attention_step, AttentionStepArgs)                             \
  X(linear_step, LinearStepArgs)

#define SEQKERN_DECLARE_CUDA_KERNEL(name, Args) void name(const Args& args, Stream stream);
SEQKERN_CUDA_KERNELS(SEQKERN_DECLARE_CUDA_KERNEL)
#undef SEQKERN_DECLARE_CUDA_KERNEL

// Bytes of device memory that the kernel wants at args.workspace (which these do not read).
int64_t lstm_forward_workspace(const LstmForwardArgs& args);
int64_t lstm_backward_workspace(const LstmBackwardArgs& args);
int64_t hidden_forward_workspace(const HiddenForwardArgs& args);
int64_t hidden_backward_workspace(const HiddenBackwardArgs& args);
// Bytes of scratch the args' workspace must have.
int64_t attention_forward_workspace(const AttentionForwardArgs& args);
int64_t attention_backward_workspace(const AttentionBackwardArgs& args);
int64_t attention_step_workspace(const AttentionStepArgs& args);
int64_t linear_step_workspace(const LinearStepArgs& args);
int64_t sample_workspace(const SampleArgs& args);

// Each .cu file names its __global__ functions, for the resource table (resources.cpp).
using VisitKernel = void (*)(void* context, const char* name, const void* kernel);
void visit_cross_entropy_kernels(VisitKernel visit, void* context);
void visit_cross_entropy_backward_kernels(VisitKernel visit, void* context);
void visit_cross_entropy_columns_kernels(VisitKernel visit, void* context);
void visit_lstm_cell_kernels(VisitKernel visit, void* context);
void visit_lstm_steps_kernels(VisitKernel visit, void* context);
void visit_lstm_steps_backward_kernels(VisitKernel visit, void* context);
void visit_lstm_kernels(VisitKernel visit, void* context);
void visit_lstm_backward_kernels(VisitKernel visit, void* context);
void visit_gru_rnn_kernels(VisitKernel visit, void* context);
void visit_gru_rnn_backward_kernels(VisitKernel visit, void* context);
void visit_gru_rnn_cell_kernels(VisitKernel visit, void* context);
void visit_gru_rnn_steps_kernels(VisitKernel visit, void* context);
void visit_sample_kernels(VisitKernel visit, void* context);
void visit_sample_passes_kernels(VisitKernel visit, void* context);
void visit_softmax_kernels(VisitKernel visit, void* context);
void visit_linear_cross_entropy_kernels(VisitKernel visit, void* context);
void visit_linear_cross_entropy_sums_kernels(VisitKernel visit, void* context);
void visit_attention_simt_kernels(VisitKernel visit, void* context);
void visit_attention_forward_mma_kernels(VisitKernel visit, void* context);
void visit_attention_backward_mma_kernels(VisitKernel visit, void* context);
void visit_attention_step_kernels(VisitKernel visit, void* context);
void visit_linear_step_kernels(VisitKernel visit, void* context);

}  // namespace seqkern::cuda
