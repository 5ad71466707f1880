// Every CPU kernel, once: each ISA defines all of them, dispatch.cpp picks the ISA.
//
// A kernel works on the range [begin, end) of its own rows; threading is the caller's.
#pragma once

#include <cstdint>

#include "ops/attention.h"
#include "ops/attention_step.h"
#include "ops/cross_entropy.h"
#include "ops/linear_cross_entropy.h"
#include "ops/sample.h"

// X(kernel, Args)
#define SEQKERN_CPU_KERNELS(X)                                     \
  X(cross_entropy_forward, CrossEntropyForwardArgs)                \
  X(cross_entropy_reduce, CrossEntropyReduceArgs)                  \
  X(cross_entropy_backward, CrossEntropyBackwardArgs)              \
  X(sample, SampleArgs)                                            \
  X(linear_cross_entropy_state, LinearCrossEntropyStateArgs)       \
  X(linear_cross_entropy_finish, LinearCrossEntropyFinishArgs)     \
  X(linear_cross_entropy_gradient, LinearCrossEntropyGradientArgs) \
  X(linear_cross_entropy_column_sums, ColumnSumsArgs)              \
  X(attention_forward, AttentionForwardArgs)                       \
  X(attention_backward, AttentionBackwardArgs)                     \
  X(attention_sum_dq, AttentionBackwardArgs)                       \
  X(attention_step_prepare, AttentionStepArgs)                     \
  X(attention_step, AttentionStepArgs)                             \
  X(attention_step_combine, AttentionStepArgs)

#define SEQKERN_DECLARE_KERNEL(name, Args) void name(const Args& args, int64_t begin, int64_t end);

namespace seqkern::cpu {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)  // dispatch.cpp
namespace baseline {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
}
namespace avx2 {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
}
namespace avx512 {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
}
}  // namespace seqkern::cpu
