// Contract of sampling the next token. Definition: docs/math/sample.md.
//
// A row of logits x [V], its tokens counted in token_counts, gives scores y (penalties), ranked by
// falling y and then by lower id. Of the probabilities exp((y - max y) / temperature) the top-k,
// then the top-p, then the min-p tokens stay, and one is drawn. The arithmetic and the algorithm
// are common/sampling.h's on every device, so that the same fp32 logits give the same token
// everywhere.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/rows.h"

namespace seqkern {

// An option that is one number, or a number per row.
template <class X>
struct PerRow {
  X value;
  const X* rows;  // [B]; null: `value` for all

  SEQKERN_HD_INLINE X at(int64_t b) const { return rows ? rows[b] : value; }
};

struct SampleArgs {
  DType dtype;
  int64_t B;           // rows
  int64_t V;           // vocabulary
  const void* logits;  // T [B, V]; float64 is rounded to float32
  Rows logits_rows;
  const int32_t* token_counts;  // [B, V] contiguous; null: no penalties
  PerRow<double> temperature;   // 0: the token of the largest score
  PerRow<int64_t> top_k;        // 0: all
  PerRow<double> top_p;
  PerRow<double> min_p;
  PerRow<double> repetition_penalty;
  PerRow<double> presence_penalty;
  PerRow<double> frequency_penalty;
  PerRow<int64_t> seed;  // one for all: row b has its own stream of it
  PerRow<int64_t> step;
  bool model_logprob;  // logprob is that of softmax(x), not of the distribution drawn from
  int64_t* token;      // [B]; -1 where the row has NaN or +inf, or nothing above -inf
  float* logprob;      // [B]; NaN for such a row
  void* workspace;     // bytes as the backend asked for, 64-byte aligned; null for none
};

}  // namespace seqkern
