// The kernel of attention_step for the matrix units, for the launcher of attention_step.
#pragma once

#include "cuda/kernels.h"
#include "ops/attention_step.h"

namespace seqkern::cuda {

// Whether it takes a call: 16 bits throughout, several query rows to a key head, heads of at most
// 128 elements, a GPU that has the instructions.
bool attention_step_takes_mma(const AttentionStepArgs& a);
void attention_step_mma(const AttentionStepArgs& a, Stream stream);
void visit_attention_step_mma_kernels(VisitKernel visit, void* context);

}  // namespace seqkern::cuda
