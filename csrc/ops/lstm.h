// Contract of the LSTM, one direction of one layer. Derivation: docs/math/lstm.md. The order of
// steps, lengths and dtypes: recurrent.h.
//
//   a_t = gates_x_t + w_hh h_{t-1} + b_hh     [4 H], gates i, f, g, o one after the other
//   i = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
//   c_t = f c_{t-1} + i g      m_t = o tanh(c_t)      h_t = m_t, or with a projection w_hr m_t
//
// Saved for backward: the activated gates, c and h (the output), and no more; or, to save less,
// only c and h, when the torch layer computes the gates again as two products over the whole
// sequence.
#pragma once

#include "ops/recurrent.h"

namespace seqkern {

struct LstmInputs {
  RecurrentInputs r;  // G = 4
  const void* w_hr;   // T [P, H] contiguous; null: no projection, and P = H
  const void* c0;     // T [B, H] contiguous; null for zeros
};

struct LstmForwardArgs {
  LstmInputs in;
  // CUDA: w_ih x_t, made before, T [T, B, 4 H].
  const void* gates_x;
  SequenceStrides gates_x_strides;
  // CPU: what the kernel makes it from, a few steps at a time.
  const void* x;     // T [T, B, I] contiguous
  const void* w_ih;  // T [4 H, I] contiguous
  int64_t I;
  // CPU: or, where x_t is one of a few vectors, where it finds it: row ids_t of a table.
  const int64_t* ids;  // [T, B] contiguous; null: by x and w_ih. Not read at times t >= L_b
  const void* table;   // T [.., 4 H] contiguous
  void* gates;  // T [T, B, 4 H] contiguous, activated; may be gates_x itself; null: not wanted.
                // Unspecified at times t >= L_b
  void* c;      // T [T, B, H] contiguous; null: not wanted
  void* h;      // T [T, B, P]
  SequenceStrides h_strides;
  void* h_n;        // T [B, P] contiguous
  void* c_n;        // T [B, H] contiguous
  void* workspace;  // bytes as the backend asked for, 64-byte aligned; null for none
};

// dgates_t is the gradient at a_t, from which the torch layer makes those of the weights, biases
// and the input, as products over the whole sequence.
struct LstmBackwardArgs {
  LstmInputs in;      // without b_hh
  const void* gates;  // T [T, B, 4 H] contiguous
  bool activated;     // gates as forward saved them; else a_t
  const void* c;      // T [T, B, H] contiguous, of forward
  const void* dh;     // T [T, B, P] gradient of all h; null for none
  SequenceStrides dh_strides;
  const void* dc;      // T [T, B, H] contiguous, gradient of all c; null for none
  const void* dh_n;    // T [B, P] contiguous; null for none
  const void* dc_n;    // T [B, H] contiguous; null for none
  void* dgates;        // T [T, B, 4 H], rows one after the other; zero at times t >= L_b
  int64_t dgates_row;  // elements from a row of dgates to the next; 4 H but on the CPU
  void* dgates_0;  // T [B, 4 H] contiguous, dgates of each row's step 0, zero where L_b = 0; null:
                   // not wanted
  void* dh0;       // T [B, P] contiguous; null: not wanted
  void* dc0;       // T [B, H] contiguous; null: not wanted
  // With a projection only, for dw_hr = sum_t dh_total_t^T m_t; both contiguous, null without.
  void* dh_total;   // T [T, B, P], whole gradient at h_t; zero at times t >= L_b
  void* m;          // T [T, B, H], o tanh(c); zero at times t >= L_b
  void* workspace;  // bytes as the backend asked for, 64-byte aligned; null for none
};

// CUDA: the pointwise part of one step, whose products are made before. a = gates_x + gates_h +
// bias; all tensors contiguous, in T. (On the CPU a step is one kernel with its products,
// cpu/cell_step.h.)
struct LstmCellForwardArgs {
  DType dtype;
  int64_t B, H;
  const void* gates_x;  // T [B, 4 H]
  const void* gates_h;  // T [B, 4 H]
  const void* bias;     // T [4 H]; null for none
  const void* c0;       // T [B, H]
  void* gates;          // T [B, 4 H] activated; may be gates_x or gates_h; null: not wanted
  void* h;              // T [B, H]
  void* c;              // T [B, H]
};

struct LstmCellBackwardArgs {
  DType dtype;
  int64_t B, H;
  const void* gates;  // T [B, 4 H] activated
  const void* c0;     // T [B, H]
  const void* c;      // T [B, H], of forward
  const void* dh;     // T [B, H]; null for none
  const void* dc;     // T [B, H]; null for none
  void* dgates;       // T [B, 4 H]
  void* dc0;          // T [B, H]
};

}  // namespace seqkern
