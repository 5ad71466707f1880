// Where row n of a tensor [..., V] begins, for any strides of the leading dimensions.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace seqkern {

inline constexpr int kMaxRowDims = 8;

// The leading dimensions after neighbours that lie evenly spaced were merged, so that the common
// case has one. Strides count elements; the last dimension has stride 1.
struct Rows {
  int32_t dims = 1;
  int64_t size[kMaxRowDims] = {1};
  int64_t stride[kMaxRowDims] = {0};

  SEQKERN_HD int64_t offset(int64_t n) const {
    if (dims == 1) return n * stride[0];
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += (n % size[d]) * stride[d];
      n /= size[d];
    }
    return offset + n * stride[0];
  }
};

}  // namespace seqkern
