// The gradients of a recurrent layer's weights and bias: sums over all tokens of outer products.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cpu {

// What a weight is multiplied with: out [M, K] = sum over n of a_n (outer) b_{n - shift}. Where
// n - shift is no row of b it is one of `edge`, the initial states: |shift| rows that stand before
// the first row of b, or after its last where shift is negative.
struct WeightGradientPart {
  const void* b;  // T [N, K] contiguous; of it N - |shift| rows are read
  int64_t K;
  int64_t shift;
  const void* edge;  // T [|shift|, K] contiguous; null for zeros
  void* out;         // T [M, K] contiguous
};

struct WeightGradientArgs {
  DType dtype;
  int64_t N, M;
  const void* a;  // T [N, M], its rows a_stride apart
  int64_t a_stride;
  WeightGradientPart parts[2];
  int count;        // parts
  void* sum;        // T [M], sum of a over n; null: not wanted
  bool accumulate;  // add to what out and sum hold; not for 16-bit T
  void* workspace;  // bytes of weight_gradient_workspace, 64-byte aligned
};

}  // namespace seqkern::cpu
