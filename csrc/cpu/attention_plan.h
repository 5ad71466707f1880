// How attention is cut into tasks on the CPU: by the shapes alone, so that the bits of a result do
// not depend on the number of threads or on the instruction set's tile.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "ops/attention.h"

namespace seqkern::cpu {
namespace {  // also compiled into the files of each instruction set

// ---------------------------------------------------------------- tasks

// Queries of a block.
inline int64_t attention_query_block(const AttentionInputs&) { return 96; }

inline int64_t attention_forward_tasks(const AttentionForwardArgs& a) {
  return a.in.B * a.in.NH * ceil_div(a.in.Tq, attention_query_block(a.in));
}

inline int64_t attention_backward_tasks(const AttentionBackwardArgs& a) {
  return a.in.B * a.in.NKV;
}

inline int64_t attention_backward_workspace(const AttentionBackwardArgs&) { return 0; }

// ---------------------------------------------------------------- which keys a query sees

// The queries of batch row b that are not padding, and the keys they see: a contiguous range each,
// whose ends never decrease from one query to the next.
struct AttentionRow {
  const AttentionInputs& in;
  int64_t offset;      // query i stands at position i + offset
  int64_t begin, end;  // queries that are not padding: each sees itself at least

  AttentionRow(const AttentionInputs& in, int64_t b) : in(in), offset(in.Tk - in.Tq) {
    begin = in.cu_seqlens ? in.cu_seqlens[0] : 0;
    end = in.cu_seqlens ? in.cu_seqlens[in.S] : in.Tq;
    if (in.lengths) {
      const int64_t last = in.lengths[b] - offset;
      end = last < 0 ? 0 : last;
    }
  }

  // The packed sequence of token t in [begin, end).
  int64_t segment_of(int64_t t) const {
    int64_t low = 0, high = in.S;  // cu_seqlens[low] <= t < cu_seqlens[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (in.cu_seqlens[middle] <= t ? low : high) = middle;
    }
    return low;
  }

  int64_t first_key(int64_t i) const {
    const int64_t first = in.cu_seqlens ? in.cu_seqlens[segment_of(i)] : 0;
    const int64_t in_window = in.window > 0 ? i + offset + 1 - in.window : 0;
    return first > in_window ? first : in_window;
  }
  int64_t end_key(int64_t i) const { return i + offset + 1; }

  // Queries [first_query(j), end_query(j)) see key j.
  int64_t first_query(int64_t j) const {
    const int64_t first = j - offset;
    return first > begin ? first : begin;
  }
  int64_t end_query(int64_t j) const {
    int64_t last = in.cu_seqlens ? in.cu_seqlens[segment_of(j) + 1] : end;
    if (in.window > 0 && j - offset + in.window < last) last = j - offset + in.window;
    return last;
  }
};

}  // namespace
}  // namespace seqkern::cpu
