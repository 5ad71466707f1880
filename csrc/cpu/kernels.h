// Every CPU kernel, once: each ISA defines all of them, dispatch.cpp picks the ISA.
//
// A kernel works on the range [begin, end) of its own rows; threading is the caller's.
#pragma once

#include <cstdint>

#include "cpu/cell_step.h"
#include "cpu/dense.h"
#include "cpu/embedding_gradient.h"
#include "cpu/panel_product.h"
#include "cpu/weight_gradient.h"
#include "ops/attention.h"
#include "ops/attention_step.h"
#include "ops/cross_entropy.h"
#include "ops/gru_rnn.h"
#include "ops/linear_cross_entropy.h"
#include "ops/linear_step.h"
#include "ops/lstm.h"
#include "ops/sample.h"
#include "ops/softmax.h"

// X(kernel, Args): the kernels that also have builds for processors that multiply 16-bit numbers,
// as those of teams have.
#define SEQKERN_CPU_MATRIX_KERNELS(X)        \
  X(attention_forward, AttentionForwardArgs) \
  X(attention_backward, AttentionBackwardArgs)

// X(kernel, Args): those that have none.
#define SEQKERN_CPU_KERNELS(X)                                     \
  X(cross_entropy_forward, CrossEntropyForwardArgs)                \
  X(cross_entropy_reduce, CrossEntropyReduceArgs)                  \
  X(cross_entropy_backward, CrossEntropyBackwardArgs)              \
  X(sample, SampleArgs)                                            \
  X(softmax_forward, SoftmaxForwardArgs)                           \
  X(softmax_backward, SoftmaxBackwardArgs)                         \
  X(linear_cross_entropy_state, LinearCrossEntropyStateArgs)       \
  X(linear_cross_entropy_finish, LinearCrossEntropyFinishArgs)     \
  X(linear_cross_entropy_gradient, LinearCrossEntropyGradientArgs) \
  X(linear_cross_entropy_column_sums, ColumnSumsArgs)              \
  X(attention_sum_dq, AttentionBackwardArgs)                       \
  X(attention_step_prepare, AttentionStepArgs)                     \
  X(attention_step, AttentionStepArgs)                             \
  X(attention_step_combine, AttentionStepArgs)                     \
  X(linear_step_prepare, LinearStepArgs)                           \
  X(linear_step, LinearStepArgs)                                   \
  X(cell_step_forward, CellStepForwardArgs)                        \
  X(cell_step_gates, CellStepGatesArgs)                            \
  X(embedding_gradient, EmbeddingGradientArgs)

// X(kernel, Args): those of the matrix unit, which are called only where it is in use.
#define SEQKERN_CPU_UNIT_KERNELS(X)            \
  X(linear_step_tiles_prepare, LinearStepArgs) \
  X(linear_step_tiles, LinearStepArgs)

// X(kernel, Args). A recurrence is run by `members` threads at most, each calling the kernel with
// its number, in any order and at any time (team.h), after one has called kernel_prepare.
#define SEQKERN_CPU_TEAM_KERNELS(X)           \
  X(lstm_forward, LstmForwardArgs)            \
  X(lstm_backward, LstmBackwardArgs)          \
  X(cell_step_packed, CellStepPackedArgs)     \
  X(cell_step_pack, CellStepPackArgs)         \
  X(cell_step_backward, CellStepBackwardArgs) \
  X(hidden_forward, HiddenForwardArgs)        \
  X(hidden_backward, HiddenBackwardArgs)      \
  X(dense, DenseArgs)                         \
  X(weight_gradient, WeightGradientArgs)      \
  X(panel_product, PanelProductArgs)

#define SEQKERN_DECLARE_KERNEL(name, Args) void name(const Args& args, int64_t begin, int64_t end);
#define SEQKERN_DECLARE_TEAM_KERNEL(name, Args)                \
  int64_t name##_workspace(const Args& args, int64_t members); \
  void name##_prepare(const Args& args, int64_t members);      \
  void name(const Args& args, int64_t members, int64_t member);

namespace seqkern::cpu {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)  // dispatch.cpp
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_UNIT_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DECLARE_TEAM_KERNEL)
namespace baseline {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DECLARE_TEAM_KERNEL)
}  // namespace baseline
namespace avx2 {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DECLARE_TEAM_KERNEL)
}  // namespace avx2
namespace avx512 {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DECLARE_TEAM_KERNEL)
}  // namespace avx512
namespace avx512_bf16 {
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DECLARE_TEAM_KERNEL)
}  // namespace avx512_bf16
namespace amx {
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_UNIT_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DECLARE_TEAM_KERNEL)
}  // namespace amx
}  // namespace seqkern::cpu
