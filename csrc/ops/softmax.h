// Contract of softmax and log-softmax over the last dimension. Derivation: docs/math/softmax.md.
//
// Row n of x with m_n = max_v x_nv and s_n = sum_v exp(x_nv - m_n):
//   softmax      y_nv = exp(x_nv - m_n) / s_n
//   log-softmax  y_nv = (x_nv - m_n) - log s_n
// A row of nothing but -inf, or with +inf or NaN, is NaN.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/rows.h"

namespace seqkern {

struct SoftmaxForwardArgs {
  DType dtype;
  bool log;
  int64_t N;      // rows
  int64_t V;      // elements per row
  const void* x;  // T [N, V]
  Rows x_rows;
  void* y;  // T [N, V] contiguous; not x
};

// softmax: dx_nv = y_nv (dy_nv - sum_u dy_nu y_nu); log-softmax: dx_nv = dy_nv - exp(y_nv) sum_u
// dy_nu.
struct SoftmaxBackwardArgs {
  DType dtype;
  bool log;
  int64_t N;
  int64_t V;
  const void* dy;  // T [N, V]
  Rows dy_rows;
  const void* y;  // T [N, V] contiguous, what forward wrote
  void* dx;       // T [N, V] contiguous; not dy or y
};

}  // namespace seqkern
