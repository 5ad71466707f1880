// Contract of linear-cross-entropy: softmax-cross-entropy of logits that exist one tile at a time.
// Derivation: docs/math/linear_cross_entropy.md.
//
// The GEMMs are the torch layer's. It makes a tile of raw logits, the products of some rows of
// hidden with some rows of weight, and the kernels here (1) fold a tile into the rows' state,
// (2) turn finished states into losses, (3) overwrite a tile with its gradient. Tiles of a row may
// come in any order, from several devices too: states are combined as docs/math says.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern {

// What all tiles of some rows have in common. Acc is float or double.
struct LinearCrossEntropyRows {
  DType acc;                 // kFloat32 or kFloat64
  int64_t N;                 // rows
  int64_t V;                 // classes of the whole vocabulary
  const int64_t* target;     // [N] class in [0, V) or ignore_index; anything else: NaN
  const void* class_weight;  // Acc [V]; null for all ones
  const void* weight_sum;    // Acc [1], sum of class_weight; null for V
  int64_t ignore_index;
  bool skip_ignored;  // ignored rows get neither state nor lse
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: no cap
};

// Columns [first_class, first_class + width) of the logits.
struct LogitsTile {
  int64_t first_class;
  int64_t width;
  const void* logits;  // Acc [N, width], without bias and cap
  const void* bias;    // Acc [width]; null for zero
};

// The state of a row, five numbers at state + k * stride + n:
enum RowStatePart {
  kStateMax,     // m = max x
  kStateSum,     // sum exp(x - m)
  kStateTarget,  // x_y if the row's class was among the tiles, else 0
  kStateMass,    // sum w           } with label_smoothing only, else 0
  kStateDot,     // sum w (x - m)   }
  kStateParts
};

struct LinearCrossEntropyStateArgs {
  LinearCrossEntropyRows rows;
  LogitsTile tile;
  bool first;  // the state is set, not continued
  void* state;
  int64_t stride;
};

struct LinearCrossEntropyFinishArgs {
  LinearCrossEntropyRows rows;
  const void* state;
  int64_t stride;
  bool add_z_loss;    // row_loss includes z_loss * lse^2 (reduction none)
  void* row_loss;     // Acc [N]; 0 for ignored rows
  void* lse;          // Acc [N]; may be null
  void* logprob;      // Acc [N], log p of the target, 0 for ignored rows; may be null
  void* row_log_sum;  // Acc [N]
  void* row_max;      // Acc [N]; saved for backward
  void* row_sum;      // Acc [N]; saved for backward
};

struct LinearCrossEntropyGradientArgs {
  LinearCrossEntropyRows rows;
  LogitsTile tile;
  const void* grad_loss;     // Acc [1] or [N]; null for no gradient
  int64_t grad_loss_stride;  // 0 for [1], 1 for [N]
  const void* grad_lse;      // Acc [N]; null for no gradient
  const void* grad_logprob;  // Acc [N]; null for no gradient
  const void* row_max;       // Acc [N]
  const void* row_sum;       // Acc [N]
  const void* norm;          // Acc [2]: factor of ce_n and of z_loss * lse_n^2; null for (1, 1)
  DType grad_dtype;          // rows.acc, or a 16-bit type with float
  void* dlogits;             // grad_dtype [N, width]; may be tile.logits where the types are equal
};

// The bias's gradient: sums of dlogits over rows, in a fixed order. A CPU kernel's range is
// columns.
struct ColumnSumsArgs {
  DType dtype;    // of x; sum is its accumulator type
  int64_t N;      // rows
  int64_t width;  // columns
  const void* x;  // [N, width]
  bool first;     // sum is set, not continued
  void* sum;      // Acc [width]
};

// sum[i] = factor * sum[i] + x[i]; what a GEMM without an accumulating form leaves to do.
struct AccumulateArgs {
  DType acc;
  int64_t numel;
  double factor;
  const void* x;  // Acc [numel]; null for zero
  void* sum;      // Acc [numel]
};

}  // namespace seqkern
