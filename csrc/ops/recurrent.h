// What the contracts of the recurrent layers (lstm.h and its kin) share.
//
// Every kernel runs one direction of one layer over a whole sequence. Batch rows are independent of
// each other. Row b has L_b = lengths[b] steps (T where lengths is null), limited to [0, T] by
// kernels that run where the host cannot look at lengths. Step s of row b is at time
//   t = s,   or with reverse   t = L_b - 1 - s,
// so that a reversed row starts at its own last token, not in its padding. "Before" a step means
// step s - 1; before step 0 is the initial state. At times t >= L_b a row has outputs of zero,
// takes no gradient and gives none. The last state of a row is that after step L_b - 1; where L_b =
// 0 it is the initial state. What a row computes does not depend on the other rows or its padding,
// bit for bit.
//
// 16-bit dtypes are storage: arithmetic is in Acc (float; double for double), h is rounded to T
// before the next step reads it, c stays in Acc from step to step.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern {

// Where [t, b, 0] of a tensor [T, B, ...] is, in elements; the last dimension has stride 1.
struct SequenceStrides {
  int64_t t, b;
};

struct RecurrentInputs {
  DType dtype;             // T below, and of every tensor but lengths
  int64_t T, B, H;         // steps, batch rows, hidden units
  int64_t P;               // width of h: proj_size where w_hr is given, else H
  const void* w_hh;        // T [G H, P] contiguous, G gates in PyTorch's order
  const void* b_hh;        // T [G H], b_hh and whatever of b_ih gates_x lacks; null for none
  const void* h0;          // T [B, P] contiguous; null for zeros
  const int64_t* lengths;  // [B], in the device's memory; null: all T
  bool reverse;
  // On the CPU, with lengths: gates_x, gates and dgates hold the real tokens only, [t, b] at row
  // first_token[b] + t, and have no rows for padding, so that the products around the kernel cost
  // what the tokens cost. Null: all [T, B].
  const int64_t* first_token;  // [B]
};

}  // namespace seqkern
