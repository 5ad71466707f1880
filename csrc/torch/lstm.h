// What the LSTM's sequence and its single step share in the torch layer.
#pragma once

#include "torch/recurrent.h"

namespace seqkern {

inline void* mutable_data(const Tensor& t, bool wanted = true) {
  return wanted ? t.mutable_data_ptr() : nullptr;
}

// Which gradients a backward op is asked for; python/seqkern/ops/_recurrent.py has the same
// numbers.
enum Needs : int64_t {
  kInput = 1,
  kH0 = 2,
  kC0 = 4,
  kWih = 8,
  kWhh = 16,
  kBias = 32,
  kWhr = 64,
};

}  // namespace seqkern
