// One step of a recurrent layer, of any cell, with its products. Cells: ops/lstm.h, ops/gru_rnn.h.
//
// Few rows read weights where they are: rows of W_ih and W_hh are contiguous along k, and a gate is
// the sum of a vector of products over k, which needs no copy. More rows are worth packing the
// weights for, a piece at a time while it is in cache, or once for many steps if the caller keeps
// the copy and knows when the weights change.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cpu {

enum class StepCell { kLstm, kGru, kTanh, kRelu };

// G, rows of the weights per unit.
constexpr int64_t gates_of(StepCell cell) {
  return cell == StepCell::kLstm ? 4 : cell == StepCell::kGru ? 3 : 1;
}

struct CellStepInputs {
  DType dtype;  // T below
  StepCell cell;
  int64_t B, I, H;   // rows, input width, units
  const void* x;     // T [B, I] contiguous, like all that follow
  const void* h0;    // T [B, H]; null for zeros
  const void* c0;    // LSTM: T [B, H]; null for zeros
  const void* w_ih;  // T [G H, I]
  const void* w_hh;  // T [G H, H]
  const void* b_ih;  // T [G H]; null for none
  const void* b_hh;  // T [G H]; null for none
};

// Units of an item of cell_step_forward's range.
inline constexpr int64_t kStepUnits = 16;

struct CellStepForwardArgs {
  CellStepInputs in;
  // Activated, for backward; null: not wanted. An RNN has no use for them.
  void* gates;  // LSTM: T [B, 4 H]; GRU: T [B, 3 H]
  void* u_n;    // GRU: T [B, H]; wanted as gates are
  void* h;      // T [B, H]
  void* c;      // LSTM: T [B, H]
};

// The same with packed weights, for any number of rows.
struct CellStepPackedArgs {
  CellStepForwardArgs step;
  const void* packed;      // both weights, as cell_step_pack made them; null: packed on the way
  int64_t packed_members;  // CellStepPackArgs::members
  void* workspace;         // bytes as asked for, 64-byte aligned
};

struct CellStepPackArgs {
  DType dtype;
  int64_t G, I, H;
  const void* w_ih;  // T [G H, I] contiguous
  const void* w_hh;  // T [G H, H] contiguous
  int64_t members;   // threads among which a step will find its units divided evenly
  void* packed;      // bytes of cell_step_pack_workspace, 64-byte aligned
};

struct CellStepBackwardArgs {
  CellStepInputs in;            // without biases
  const void* gates = nullptr;  // of forward, as are u_n, h and c
  const void* u_n = nullptr;
  const void* h = nullptr;   // RNN: T [B, H]
  const void* c = nullptr;   // LSTM: T [B, H]
  const void* dh = nullptr;  // T [B, H]; null for none
  const void* dc = nullptr;  // LSTM: T [B, H]; null for none
  // Gradients, null where not wanted.
  void* dx = nullptr;         // T [B, I]
  void* dh0 = nullptr;        // T [B, H]
  void* dc0 = nullptr;        // LSTM: T [B, H]
  void* dw_ih = nullptr;      // T [G H, I]
  void* dw_hh = nullptr;      // T [G H, H]
  void* db_ih = nullptr;      // T [G H]
  void* db_hh = nullptr;      // GRU: T [G H]; of the others it is db_ih
  void* workspace = nullptr;  // bytes as asked for, 64-byte aligned
};

// The pointwise part of backward alone, where its products are made elsewhere.
struct CellStepGatesArgs {
  CellStepBackwardArgs step;  // of the gradients dc0 alone
  // T [B, G H], rows one after the other: the gradients at the products with x, and, of the GRU,
  // with h.
  void* dgates;
  void* du;
  int64_t row;  // elements from a row of either to the next
  void* past;   // GRU: T [B, H] contiguous, what h0 gets past the gates
};

}  // namespace seqkern::cpu
