// How a step of attention is cut into tasks on the CPU, and where each task's results lie.
#pragma once

#include "common/host_device.h"
#include "ops/attention_step.h"

namespace seqkern::cpu {

// Keys of a task. Long enough that a task's own cost is nothing beside reading them, short enough
// that one key head of a long cache is work for several threads.
inline constexpr int64_t kStepRun = 512;

// In elements of the accumulator type. A query row's partial result is its unnormalised output
// [stride], then its maximum and its sum.
struct StepPlan {
  int64_t group;    // NH / NKV
  int64_t rows;     // group * S, query rows that share a key head
  int64_t runs;     // tasks per row of the batch and key head
  int64_t stride;   // D in whole vectors of any instruction set
  int64_t partial;  // of a query row
  int64_t queries;  // of all prepared queries, [B, NH, S, stride]

  SEQKERN_HD_INLINE explicit StepPlan(const AttentionStepArgs& a) {
    constexpr int64_t kWidest = 16;
    int64_t longest = 0;
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t length = a.positions[b] + a.S;
      longest = length > longest ? length : longest;
    }
    group = a.NH / a.NKV;
    rows = group * a.S;
    runs = (longest + kStepRun - 1) / kStepRun;
    stride = (a.D + kWidest - 1) / kWidest * kWidest;
    partial = stride + 2;
    queries = a.B * a.NH * a.S * stride;
  }
  SEQKERN_HD_INLINE int64_t elements(const AttentionStepArgs& a) const {
    return queries + a.B * a.NKV * runs * rows * partial;
  }
};

}  // namespace seqkern::cpu
