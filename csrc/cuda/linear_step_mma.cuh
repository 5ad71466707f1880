// The kernel of linear_step for the matrix units, for the launcher of linear_step.
#pragma once

#include "cuda/kernels.h"
#include "ops/linear_step.h"

namespace seqkern::cuda {

// Whether it takes a call, of any number of rows: bfloat16 weights, or float16 ones beside x of the
// same type without a norm; a GPU that has the instructions.
bool linear_step_takes_mma(const LinearStepArgs& a);
int64_t linear_step_mma_workspace(const LinearStepArgs& a);
void linear_step_mma(const LinearStepArgs& a, Stream stream);
void visit_linear_step_mma_kernels(VisitKernel visit, void* context);

}  // namespace seqkern::cuda
