// How the linear layer of a step is cut into tasks on the CPU, and where its rows lie.
#pragma once

#include "common/host_device.h"
#include "ops/linear_step.h"

namespace seqkern::cpu {

// Outputs of a task: whole vectors of any instruction set.
inline constexpr int64_t kStepOutputs = 16;

struct LinearStepPlan {
  int64_t groups;  // tasks
  int64_t stride;  // of a prepared row, in elements of the accumulator type: whole vectors

  SEQKERN_HD_INLINE explicit LinearStepPlan(const LinearStepArgs& a)
      : groups((a.M + kStepOutputs - 1) / kStepOutputs), stride((a.K + 15) / 16 * 16) {}
};

}  // namespace seqkern::cpu
