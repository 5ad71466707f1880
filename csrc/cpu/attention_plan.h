// How attention is cut into tasks on the CPU: by the shapes alone, so that the bits of a result do
// not depend on the number of threads or on the instruction set's tile.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "ops/attention.h"

namespace seqkern::cpu {
namespace {  // also compiled into the files of each instruction set

// ---------------------------------------------------------------- tasks

// Queries of a block of forward: as many as leave half of a task's scratch to the keys.
inline int64_t attention_query_block(const AttentionInputs& in) {
  constexpr int64_t kBytes = 128 * 1024;
  const int64_t bytes_per_query = 2 * in.D * (in.dtype == DType::kFloat64 ? 8 : 4);
  int64_t block = 96;
  while (block * bytes_per_query > kBytes) block /= 2;
  return block;
}

inline int64_t attention_forward_tasks(const AttentionForwardArgs& a) {
  return a.in.B * a.in.NH * ceil_div(a.in.Tq, attention_query_block(a.in));
}

// Multiplications of one product with all the scores, to tell small calls from large ones.
inline int64_t attention_work(const AttentionInputs& in) {
  const int64_t seen = in.window > 0 && in.window < in.Tk ? in.window : in.Tk;
  return in.B * in.NH * in.Tq * seen * in.D;
}

// Backward: a task is a chunk of the keys of one key head, against all queries of its group. More
// than one chunk where there are few heads; each then writes dq sums of its own, which are added in
// a second step.
struct AttentionBackwardPlan {
  int64_t chunks, chunk;  // keys of a chunk
  int64_t tasks, sum_tasks;
  int64_t width;                       // D in whole cache lines: of a row in the workspace
  int64_t item;                        // bytes of Acc
  int64_t dq_at, dk_at, dv_at, bytes;  // offsets into the workspace
  bool dq_sums, dkv_sums;              // whether these are in it

  static constexpr int64_t kSumRows = 64;

  explicit AttentionBackwardPlan(const AttentionInputs& in) {
    constexpr int64_t kTasks = 64, kMostChunks = 8, kLeastKeys = 256, kBlock = 96;
    const int64_t heads = in.B * in.NKV;
    chunks = ceil_div(kTasks, heads > 0 ? heads : 1);
    if (chunks > kMostChunks) chunks = kMostChunks;
    if (chunks > ceil_div(in.Tk, kLeastKeys)) chunks = ceil_div(in.Tk, kLeastKeys);
    chunk = ceil_div(ceil_div(in.Tk, chunks), kBlock) * kBlock;
    chunks = ceil_div(in.Tk, chunk);
    tasks = heads * chunks;
    item = in.dtype == DType::kFloat64 ? 8 : 4;
    width = ceil_div(in.D, int64_t{16}) * 16;
    dq_sums = chunks > 1;
    sum_tasks = dq_sums ? in.B * in.NH * ceil_div(in.Tq, kSumRows) : 0;
    // dk and dv are summed where they go if they can hold a sum and whole vectors.
    const bool sixteen_bit = in.dtype == DType::kFloat16 || in.dtype == DType::kBFloat16;
    dkv_sums = sixteen_bit || in.D % 16 != 0;
    dq_at = 0;
    dk_at = dq_at + (dq_sums ? chunks * in.B * in.NH * in.Tq * width * item : 0);
    dv_at = dk_at + (dkv_sums ? heads * in.Tk * width * item : 0);
    bytes = dv_at + (dv_at - dk_at);
  }
};

inline int64_t attention_backward_workspace(const AttentionBackwardArgs& a) {
  return AttentionBackwardPlan(a.in).bytes;
}

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

// A block of queries [begin, end) of a head; [first, last) of them are not padding.
struct AttentionForwardBlock {
  int64_t b, h, begin, end, first, last;

  AttentionForwardBlock(const AttentionInputs& in, int64_t queries, int64_t head, int64_t block)
      : b(head / in.NH), h(head % in.NH), begin(block * queries), end(begin + queries) {
    if (end > in.Tq) end = in.Tq;
    const AttentionRow row(in, b);
    first = begin > row.begin ? begin : row.begin;
    if (first > end) first = end;
    last = end < row.end ? end : row.end;
    if (last < first) last = first;
  }
};

}  // namespace
}  // namespace seqkern::cpu
