// One step of an LSTM with its products, for few rows: weights are read where they are.
//
// A step reads each weight once, so that a packed copy would have to be kept from call to call, and
// be found out when the weight changes behind its back. Rows of W_ih and W_hh are contiguous along
// k: a gate is the sum of a vector of products over k, which needs no copy. With more rows than
// Backend::kStepRows the products are matrix products like others.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cpu {

struct LstmStepInputs {
  DType dtype;       // T below
  int64_t B, I, H;   // rows, input width, units
  const void* x;     // T [B, I] contiguous, like all that follow
  const void* h0;    // T [B, H]; null for zeros
  const void* c0;    // T [B, H]; null for zeros
  const void* w_ih;  // T [4 H, I]
  const void* w_hh;  // T [4 H, H]
  const void* b_ih;  // T [4 H]; null for none
  const void* b_hh;  // T [4 H]; null for none
};

// Units of an item of lstm_step_forward's range.
inline constexpr int64_t kStepUnits = 16;

struct LstmStepForwardArgs {
  LstmStepInputs in;
  void* gates;  // T [B, 4 H] activated; null: not wanted
  void* h;      // T [B, H]
  void* c;      // T [B, H]
};

struct LstmStepBackwardArgs {
  LstmStepInputs in;  // without biases
  const void* gates;  // T [B, 4 H], of forward
  const void* c;      // T [B, H], of forward
  const void* dh;     // T [B, H]; null for none
  const void* dc;     // T [B, H]; null for none
  // Gradients, null where not wanted.
  void* dx;         // T [B, I]
  void* dh0;        // T [B, H]
  void* dc0;        // T [B, H]
  void* dw_ih;      // T [4 H, I]
  void* dw_hh;      // T [4 H, H]
  void* db;         // T [4 H]
  void* workspace;  // bytes as asked for, 64-byte aligned
};

}  // namespace seqkern::cpu
