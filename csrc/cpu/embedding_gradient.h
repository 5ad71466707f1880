// The gradient of a table whose rows were looked up: out_v = sum over n with id_n = v of a_n.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cpu {

// Columns that the kernel's range counts as one.
constexpr int64_t kGradientColumns = 64;

struct EmbeddingGradientArgs {
  DType dtype;
  int64_t N, W, V;
  const void* a;  // T [N, W], its rows a_stride apart
  int64_t a_stride;
  const int64_t* order;  // [N] rows of a, those of one id beside each other, ids rising
  const int64_t* first;  // [V + 1] where in `order` those of an id begin
  void* out;             // T [V, W] contiguous
  bool accumulate;       // add to what out holds; not for 16-bit T
};

}  // namespace seqkern::cpu
