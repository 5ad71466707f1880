// Contract of softmax-cross-entropy. Derivation: docs/math/cross_entropy.md.
//
// Row n of the logits x, capped first if softcap > 0 (x -> softcap * tanh(x / softcap)):
//   lse_n = log sum_v exp(x_nv)
//   ce_n  = sum_v w_v q_nv (lse_n - x_nv),   q = (1 - label_smoothing) * target + label_smoothing /
//   V
// where `target` is one-hot at target[n], or a row of class probabilities. For one-hot targets the
// (1 - label_smoothing) part and the uniform part carry the class weights as PyTorch does.
// Rows whose target is ignore_index have ce_n = 0 and no gradient through ce and z_loss.
// A target that is neither a class nor ignore_index is never used as an index: the CPU's torch
// layer refuses it before the launch; on CUDA, which cannot look, the row's loss and gradient are
// NaN.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/rows.h"

namespace seqkern {

// Rows that lie side by side: row n is the (n % side)-th of batch n / side. Its class v is at
// (n / side) * batch_stride + n % side + v * class_stride.
struct ClassColumns {
  int64_t batch_stride, class_stride;
};

// Acc is double for double logits, float otherwise; pointers to it are passed as void.
struct CrossEntropyInputs {
  DType dtype;
  int64_t N;           // rows
  int64_t V;           // classes
  const void* logits;  // T [N, V]
  Rows logits_rows;
  // Where not 0, the Rows are not used but the columns; dlogits is then [N / side, V, side]
  // contiguous.
  int64_t side;
  ClassColumns logits_columns;
  const int64_t* target;     // [N] class per row; null with class probabilities
  const void* target_probs;  // T [N, V] class probabilities; null with class indices
  Rows target_probs_rows;
  ClassColumns target_probs_columns;
  const void* weight;      // Acc [V]; null for all ones
  const void* weight_sum;  // Acc [1], sum of weight; null for V
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: no cap
};

// A row's log-sum-exp is kept as its maximum m and log_sum = log sum_v exp(x_nv - m): with logits
// near 1e4 their float sum would have lost the digits that p = exp((x - m) - log_sum) needs.
struct CrossEntropyForwardArgs {
  CrossEntropyInputs in;
  bool add_z_loss;  // row_loss includes z_loss * lse^2 (reduction none)
  void* row_loss;   // Acc [N]
  void* lse;  // Acc [N]; null: not wanted, and ignored rows are skipped (their row_max, row_log_sum
              // are 0)
  void* row_max;      // Acc [N]; saved for backward
  void* row_log_sum;  // Acc [N]; saved for backward
};

enum class Reduction : int32_t { kNone, kMean, kSum };

// Reduces row losses in a fixed order, so that the bits do not depend on the number of threads.
struct CrossEntropyReduceArgs {
  CrossEntropyInputs in;
  Reduction reduction;      // kMean or kSum
  const void* row_loss;     // Acc [N], without z_loss
  const void* row_max;      // Acc [N]
  const void* row_log_sum;  // Acc [N]
  void* loss;               // Acc [1]
  void* norm;  // Acc [2]: factor of ce_n and of z_loss * lse_n^2 in the loss; saved for backward
};

struct CrossEntropyBackwardArgs {
  CrossEntropyInputs in;
  const void* grad_loss;     // Acc [1] or [N]; null for no gradient
  int64_t grad_loss_stride;  // 0 for [1], 1 for [N]
  const void* grad_lse;      // Acc [N]; null for no gradient
  const void* row_max;       // Acc [N]
  const void* row_log_sum;   // Acc [N]
  const void* norm;          // Acc [2]; null for (1, 1)
  void* dlogits;             // T [N, V] contiguous, unless in.side
};

}  // namespace seqkern
