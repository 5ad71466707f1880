// One step of an LSTM with its products.
//
// Few rows read weights where they are: rows of W_ih and W_hh are contiguous along k, and a gate is
// the sum of a vector of products over k, which needs no copy. More rows are worth packing the
// weights for, a piece at a time while it is in cache, or once for many steps if the caller keeps
// the copy and knows when the weights change.
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

// The same with packed weights, for any number of rows.
struct LstmStepPackedArgs {
  LstmStepForwardArgs step;
  const void* packed;      // both weights, as lstm_step_pack made them; null: packed on the way
  int64_t packed_members;  // LstmStepPackArgs::members
  void* workspace;         // bytes as asked for, 64-byte aligned
};

struct LstmStepPackArgs {
  DType dtype;
  int64_t I, H;
  const void* w_ih;  // T [4 H, I] contiguous
  const void* w_hh;  // T [4 H, H] contiguous
  int64_t members;   // threads among which a step will find its units divided evenly
  void* packed;      // bytes of lstm_step_pack_workspace, 64-byte aligned
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
