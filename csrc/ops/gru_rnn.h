// Contract of the layers whose state is h alone: the GRU and the RNN, one direction of one layer.
// Derivations: docs/math/gru.md, docs/math/rnn.md. The order of steps, lengths and dtypes:
// recurrent.h. h is all the state there is, so forward and backward are the same walk for both, and
// only what stands below as "GRU" differs.
//
//   GRU   a_t = gates_x_t + b_ih     u_t = w_hh h_{t-1} + b_hh     [3 H], gates r, z, n
//         r = sigmoid(a_r + u_r)   z = sigmoid(a_z + u_z)   n = tanh(a_n + r u_n)
//         h_t = n + z (h_{t-1} - n)
//   RNN   h_t = tanh or relu of gates_x_t + b_ih + w_hh h_{t-1} + b_hh     [H]
//
// Saved for backward: the GRU's r, z, n and u_n, and h (the output); of an RNN h alone.
#pragma once

#include "ops/recurrent.h"

namespace seqkern {

enum class HiddenCell { kGru, kTanh, kRelu };

// G, rows of the weights per unit.
constexpr int64_t gates_of(HiddenCell cell) { return cell == HiddenCell::kGru ? 3 : 1; }

struct HiddenForwardArgs {
  RecurrentInputs r;  // P = H
  HiddenCell cell;
  const void* b_ih;     // T [G H]; null for none
  const void* gates_x;  // T [T, B, G H] contiguous, w_ih x_t
  void* gates;          // GRU: T [T, B, 3 H] contiguous, r, z, n; may be gates_x itself; null: not
                        // wanted. Unspecified at times t >= L_b
  void* u_n;            // GRU: T [T, B, H] contiguous; wanted as gates are
  void* h;              // T [T, B, H] contiguous; of an RNN it may be gates_x itself
  void* h_n;            // T [B, H] contiguous
  void* workspace;      // bytes as the backend asked for, 64-byte aligned; null for none
};

// The gradients at a_t and at u_t, from which the torch layer makes those of the weights, biases
// and the input, as products over the whole sequence. They differ in gate n alone, and for an RNN
// not at all, so they are dgates [r, z, n] of a_t, and du_n.
struct HiddenBackwardArgs {
  RecurrentInputs r;  // without b_hh
  HiddenCell cell;
  const void* gates;  // GRU: T [T, B, 3 H] contiguous
  const void* u_n;    // GRU: T [T, B, H] contiguous
  bool activated;     // gates as forward saved them; else a_r + u_r, a_z + u_z and a_n
  const void* h;      // T [T, B, H] contiguous, of forward
  const void* dh;     // T [T, B, H] gradient of all h; null for none
  SequenceStrides dh_strides;
  const void* dh_n;  // T [B, H] contiguous; null for none
  void* dgates;      // T [T, B, G H] contiguous; zero at times t >= L_b
  void* du_n;        // GRU: T [T, B, H] contiguous; zero at times t >= L_b
  void* du_0;        // T [B, G H] contiguous, gradient at u of each row's step 0, zero where
                     // L_b = 0; null: not wanted
  void* dh0;         // T [B, H] contiguous; null: not wanted
  void* workspace;   // bytes as the backend asked for, 64-byte aligned; null for none
};

// CUDA: the pointwise part of one step, whose products are made before; all tensors contiguous, in
// T. (On the CPU a step is one kernel with its products, cpu/cell_step.h.)
struct HiddenCellForwardArgs {
  DType dtype;
  HiddenCell cell;
  int64_t B, H;
  const void* gates_x;  // T [B, G H], w_ih x
  const void* gates_h;  // T [B, G H], w_hh h
  const void* b_ih;     // T [G H]; null for none
  const void* b_hh;     // T [G H]; null for none
  const void* h0;       // T [B, H]
  void* gates;          // GRU: T [B, 3 H], r, z, n; null: not wanted
  void* u_n;            // GRU: T [B, H]; wanted as gates are
  void* h;              // T [B, H]
};

struct HiddenCellBackwardArgs {
  DType dtype;
  HiddenCell cell;
  int64_t B, H;
  const void* gates;  // GRU, of forward, as is u_n
  const void* u_n;
  const void* h0;  // T [B, H]
  const void* h;   // RNN: T [B, H], of forward
  const void* dh;  // T [B, H]; null for none
  void* dgates;    // T [B, G H], gradient at a
  void* du;        // GRU: T [B, 3 H], gradient at u
  void* past;      // GRU: T [B, H], what h0 gets past the gates
};

}  // namespace seqkern
