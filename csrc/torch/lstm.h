// What the LSTM's sequence and its single step share in the torch layer.
#pragma once

#include "torch/cell_step.h"

namespace seqkern {

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

// Those of a step.
inline StepWanted step_wanted(int64_t needs) {
  return {.input = (needs & kInput) != 0,
          .h0 = (needs & kH0) != 0,
          .w_ih = (needs & kWih) != 0,
          .w_hh = (needs & kWhh) != 0,
          .b_ih = (needs & kBias) != 0,
          .b_hh = false};
}

}  // namespace seqkern
