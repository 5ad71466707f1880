// Contract of one step of attention with a cache of keys and values. Derivation:
// docs/math/attention_step.md.
//
// Row b of the batch has positions[b] tokens in its cache. Its S new tokens s stand at p =
// positions[b] + s: their keys and values are stored there (keys rotated first, where a rotary
// embedding is given), and their queries (rotated alike) see the cached keys j <= p, with a window
// those j > p - window. What is stored at p and beyond before the call is never read. With x =
// scale q . k, capped as softcap tanh(x / softcap), out = softmax(x) v. Query head h reads key head
// h / (NH / NKV).
//
// Keys are split into runs whose results are combined in order. Their length depends on nothing but
// the row itself, so that its result depends on neither the batch around it nor the number of
// threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "ops/attention.h"

namespace seqkern {

inline constexpr int64_t kMaxStepTokens = 16;

struct AttentionStepArgs {
  DType dtype;        // T, of q, the new keys and values, and out
  DType cache_dtype;  // C, of the cache: T, or a 16-bit type where T is float32
  int64_t B, NH, NKV, S, D;
  int64_t L;          // tokens a row's cache holds at most
  const void* q;      // T [B, NH, S, D]
  const void* k_new;  // T [B, NKV, S, D]
  const void* v_new;  // T [B, NKV, S, D]
  HeadStrides q_strides, k_new_strides, v_new_strides;
  void* k_cache;  // C [B, NKV, L, D]; written at [b, :, p, :]
  void* v_cache;  // C [B, NKV, L, D]; written likewise
  HeadStrides k_cache_strides, v_cache_strides;
  // [B]. positions[b] + S <= L; where only the device can tell, tokens beyond are not stored and
  // their out is NaN.
  const int64_t* positions;
  const float* cos;  // [positions, R / 2] contiguous, at least L positions; null: no rotation
  const float* sin;  // [positions, R / 2]
  int64_t R;         // the first R elements of a head are rotated; even, at most D
  bool interleaved;  // pairs are (2 i, 2 i + 1); else (i, i + R / 2)
  double scale;
  int64_t window;  // keys a query sees at most, itself among them; 0: all
  double softcap;  // 0: none
  void* out;       // T [B, NH, S, D]
  HeadStrides out_strides;
  void* workspace;    // bytes as the backend asked for, 64-byte aligned
  int32_t* counters;  // [B, NKV], zero before and after each call; CUDA only
};

}  // namespace seqkern
