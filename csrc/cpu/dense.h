// The products over a whole sequence that surround a recurrence, on the tiles of the recurrence.
//
// A library's sgemm decides anew how to divide every product; here the divisions are known, and
// 16-bit tensors are converted on the way instead of being multiplied in their own precision.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cpu {

// out [N, M] = a [N, K] b, with b (k, m) at w[k * k_stride + m * m_stride].
struct DenseArgs {
  DType dtype;
  int64_t N, K, M;
  const void* a;  // T [N, K], its rows a_stride apart
  int64_t a_stride;
  const void* w;  // T
  int64_t k_stride, m_stride;
  void* out;        // T [N, M] contiguous
  void* workspace;  // bytes of dense_workspace, 64-byte aligned
};

}  // namespace seqkern::cpu
