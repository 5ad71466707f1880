// Contract of causal attention. Derivation: docs/math/attention.md.
//
// A segment is one sequence: a row of the batch, or, where sequences are packed one after the other
// (cu_seqlens), one of them. Query i of a segment stands at position p = i + (Tk - Tq) of it
// (packed: p = i) and sees the keys
//   j <= p,   j > p - window where window > 0,   j < length of the segment where lengths are given.
// With s the scaled product, capped and biased,
//   s_ij = cap(scale q_i . k_j) - slope_h (p - j),   cap(x) = softcap tanh(x / softcap) or x,
//   lse_i = log sum_j exp(s_ij),   out_i = sum_j keep_ij / (1 - dropout_p) exp(s_ij - lse_i) v_j.
// A query that sees no key, and one at or beyond the length of its segment (padding), has out = 0,
// lse = -inf and gives and gets no gradient. Query head h reads key head h / (NH / NKV).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/philox.h"

namespace seqkern {

// Where [b, h, t, 0] of a tensor [B, heads, T, D] is, in elements; the last dimension has stride 1.
struct HeadStrides {
  int64_t b, h, t;
};

struct AttentionInputs {
  DType dtype;
  int64_t B, NH, NKV, Tq, Tk, D;  // packed: B = 1 and Tq = Tk = tokens of all sequences
  const void* q;                  // T [B, NH, Tq, D]
  const void* k;                  // T [B, NKV, Tk, D]
  const void* v;                  // T [B, NKV, Tk, D]
  HeadStrides q_strides, k_strides, v_strides;
  const int64_t* lengths;     // [B] keys that exist, 0 <= lengths[b] <= Tk; null: all. Not packed
  const int64_t* cu_seqlens;  // [S + 1] first token of each packed sequence, and their end; null
  int64_t S;                  // packed sequences; 0 where cu_seqlens is null
  double scale;
  int64_t window;              // keys a query sees at most, itself among them; 0: all
  double softcap;              // 0: none
  const float* alibi_slopes;   // [B or 1, NH]; null: none
  int64_t alibi_batch_stride;  // NH or 0
  double dropout_p;            // probability of dropping, in [0, 1)
  const int64_t* seed;         // [1], in the device's memory; null without dropout
};

struct AttentionForwardArgs {
  AttentionInputs in;
  void* out;  // T [B, NH, Tq, D]
  HeadStrides out_strides;
  void* lse;        // Acc [B, NH, Tq] contiguous
  void* workspace;  // bytes as the backend asked for, 64-byte aligned; null for none
};

struct AttentionBackwardArgs {
  AttentionInputs in;
  const void* out;  // T [B, NH, Tq, D], of forward
  HeadStrides out_strides;
  const void* lse;   // Acc [B, NH, Tq] contiguous, of forward
  const void* dout;  // T [B, NH, Tq, D]; null for no gradient
  HeadStrides dout_strides;
  const void* dlse;  // Acc [B, NH, Tq] contiguous; null for no gradient
  void* dq;          // T [B, NH, Tq, D]
  void* dk;          // T [B, NKV, Tk, D]
  void* dv;          // T [B, NKV, Tk, D]
  HeadStrides dq_strides, dk_strides, dv_strides;
  void* workspace;  // bytes as the backend asked for, 64-byte aligned; null for none
};

// Dropout of the four keys 4 * block .. 4 * block + 3 of query i: key 4 * block + n is kept where
// word[n] >= dropout_threshold(p). The counter names the element, so that any kernel, tiled in any
// way and on any device, forward or backward, draws the same mask. Packed: b is 0, i and the keys
// count from the beginning of the whole tensor; keys and queries are indices into the tensors.
SEQKERN_HD_INLINE PhiloxBits attention_dropout_bits(uint64_t seed, int64_t b, int64_t h, int64_t NH,
                                                    int64_t i, int64_t block) {
  return philox(seed, (static_cast<uint64_t>(i) << 32) | static_cast<uint32_t>(block),
                static_cast<uint64_t>(b * NH + h));
}
SEQKERN_HD_INLINE uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(p * 4294967296.0);
}

}  // namespace seqkern
