// Contract of the linear layer of a decoding step: a linear layer of few rows with the
// normalisation before it and the activation and residual after it. Derivation:
// docs/math/linear_step.md.
//
// y_n = residual_n + act(norm(x_n) W^T + b); gated, with W and b of twice as many rows,
// y_n = residual_n + act(norm(x_n) W1^T + b1) * (norm(x_n) W2^T + b2), W1 the first half.
// layer norm: (x - mean) / sqrt(variance + eps) w + c; RMS norm: x / sqrt(mean(x^2) + eps) w.
// Everything between x and y is in the accumulator type.
//
// A row of y depends on its row of x alone: not on the rows beside it or the number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/rows.h"

namespace seqkern {

enum class StepNorm : int32_t { kNone, kLayerNorm, kRmsNorm };
enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kSilu, kRelu };

struct LinearStepArgs {
  DType dtype;         // T, of x, residual and y
  DType weight_dtype;  // W, of all parameters: T, or a 16-bit type where T is float32
  int64_t N, K, M;     // rows, inputs, outputs
  const void* x;       // T [N, K]
  Rows x_rows;
  StepNorm norm;
  const void* norm_weight;  // W [K] contiguous; null: ones
  const void* norm_bias;    // W [K] contiguous, of a layer norm; null: zeros
  double eps;
  const void* weight;     // W [M, K]; gated, [2 M, K]
  int64_t weight_stride;  // elements from a row of it to the next
  const void* bias;       // W [M] contiguous, or [2 M]; null: zeros
  Activation activation;
  bool gated;
  const void* residual;  // T [N, M]; null: none
  Rows residual_rows;
  void* y;          // T [N, M] contiguous; shares no memory with the others
  void* workspace;  // bytes as the backend asked for, 64-byte aligned
};

}  // namespace seqkern
