// What sequences and single steps of the GRU and the RNN share in the torch layer.
#pragma once

#include "ops/gru_rnn.h"
#include "torch/cell_step.h"

namespace seqkern {

// Which gradients a backward op is asked for; python/seqkern/ops/_recurrent.py has the same
// numbers.
enum Needs : int64_t {
  kInput = 1,
  kH0 = 2,
  kWih = 4,
  kWhh = 8,
  kBih = 16,
  kBhh = 32,
};

// Those of a step.
inline StepWanted step_wanted(int64_t needs) {
  return {.input = (needs & kInput) != 0,
          .h0 = (needs & kH0) != 0,
          .w_ih = (needs & kWih) != 0,
          .w_hh = (needs & kWhh) != 0,
          .b_ih = (needs & kBih) != 0,
          .b_hh = (needs & kBhh) != 0};
}

inline HiddenCell rnn_cell_kind(bool relu) { return relu ? HiddenCell::kRelu : HiddenCell::kTanh; }

#if defined(SEQKERN_BACKEND_CPU)
inline cpu::StepCell step_cell(HiddenCell cell) {
  return cell == HiddenCell::kGru    ? cpu::StepCell::kGru
         : cell == HiddenCell::kRelu ? cpu::StepCell::kRelu
                                     : cpu::StepCell::kTanh;
}
#endif

}  // namespace seqkern
