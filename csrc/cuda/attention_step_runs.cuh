// How attention_step cuts a row's keys into runs, one for a block, and puts their results together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "cuda/attention_step_tile.cuh"
#include "ops/attention_step.h"

namespace seqkern::cuda {

inline constexpr int kRun = 128;  // keys of a run at least
inline constexpr int kMostRuns = 128;

// The most runs of a row: enough blocks for a large GPU from one row of the batch, and no more,
// since all are combined by one block in the end.
__host__ __device__ __forceinline__ int most_runs(int64_t NKV) {
  constexpr int64_t kBlocks = 256, kFewest = 32;
  const int64_t runs = kBlocks / NKV;
  return static_cast<int>(runs < kFewest ? kFewest : runs < kMostRuns ? runs : kMostRuns);
}

// A block's place.
struct StepWork {
  int b, head, run;
  int position;    // of the first new token
  int tokens;      // new tokens that fit into the cache
  int runs;        // of the row, at least 1
  int begin, end;  // keys of this run
};

__device__ __forceinline__ StepWork find_step(const AttentionStepArgs& a) {
  StepWork w;
  w.run = static_cast<int>(blockIdx.x);
  w.head = static_cast<int>(blockIdx.y);
  w.b = static_cast<int>(blockIdx.z);
  const int64_t p = a.positions[w.b];
  // What cannot be checked without waiting for the device must not become an access outside.
  const int64_t fits = p < 0 ? 0 : a.L - p;
  w.position = static_cast<int>(p < 0 || p > a.L ? a.L : p);
  w.tokens = static_cast<int>(fits < 0 ? 0 : fits < a.S ? fits : a.S);
  const int length = w.position + w.tokens;
  const int oldest =
      a.window > 0 && a.window <= w.position ? w.position + 1 - static_cast<int>(a.window) : 0;
  // A run's length depends on how many keys the row sees, and on nothing beside the row.
  const int first = oldest / kRun * kRun, pieces = ceil_div(length - first, kRun);
  const int most = most_runs(a.NKV);
  int of_run = 1;  // pieces
  while (ceil_div(pieces, of_run) > most) of_run *= 2;
  w.runs = max(1, ceil_div(pieces, of_run));
  const int64_t begin = first + static_cast<int64_t>(w.run) * of_run * kRun;
  const int64_t end = begin + static_cast<int64_t>(of_run) * kRun;
  w.begin = static_cast<int>(max(begin, static_cast<int64_t>(oldest)));
  w.end = static_cast<int>(min(end, static_cast<int64_t>(length)));
  return w;
}

// Runs that there must be room for: of the longest row that fits, of which a window sees a part.
inline int step_runs_of(const AttentionStepArgs& a) {
  int64_t seen = a.L;
  if (a.window > 0 && a.window < a.L) seen = std::min(a.L, a.window + a.S - 1 + kRun - 1);
  return static_cast<int>(std::min<int64_t>(most_runs(a.NKV), ceil_div<int64_t>(seen, kRun)));
}

inline dim3 step_grid(const AttentionStepArgs& a) {
  return dim3(static_cast<unsigned>(step_runs_of(a)), static_cast<unsigned>(a.NKV),
              static_cast<unsigned>(a.B));
}

// ---------------------------------------------------------------- the results of the runs

// In the workspace, for each row of the batch, key head, run and query row: unnormalised outputs
// [packs * P], and apart from them the largest score and the sum [2].
template <class Acc>
struct StepPartials {
  Acc* outs;
  Acc* ends;
  int64_t rows;  // query rows of a run
  int width;     // of an output, a multiple of 16 bytes
};

template <class Acc>
__device__ __forceinline__ StepPartials<Acc> step_partials(const AttentionStepArgs& a,
                                                           const StepWork& w, int width) {
  const int64_t rows = a.NH / a.NKV * a.S, of_head = rows * gridDim.x;
  const int64_t head = static_cast<int64_t>(w.b) * a.NKV + w.head;
  Acc* outs = static_cast<Acc*>(a.workspace);
  Acc* ends = outs + a.B * a.NKV * of_head * width;
  return {.outs = outs + head * of_head * width,
          .ends = ends + head * of_head * 2,
          .rows = rows,
          .width = width};
}

// Rows [row0, row0 + rows) of the output, from all runs in order: out(r, d, value).
template <int R, class Acc, class F>
__device__ void combine_runs(const StepPartials<Acc>& partials, int runs, int64_t row0, int rows,
                             Acc (*factors)[kMostRuns], F out) {
  constexpr int Q = kPack<Acc>, kAhead = 8;  // loads in flight
  const auto sum_of = [](Acc x, Acc y) { return x + y; };
  const int rank = static_cast<int>(threadIdx.x), lane = rank % kWarp;
  for (int r = rank / kWarp; r < rows; r += kStepWarps) {
    const Acc* ends = partials.ends + (row0 + r) * 2;
    Acc largest = lowest<Acc>(), sum = 0;
    for (int run = lane; run < runs; run += kWarp) {
      largest = max_of(largest, ends[run * partials.rows * 2]);
    }
    largest = warp_reduce(largest, [](Acc x, Acc y) { return max_of(x, y); });
    for (int run = lane; run < runs; run += kWarp) {
      const Acc* of_run = ends + run * partials.rows * 2;
      // A run of which the row sees no key adds nothing.
      const Acc factor = of_run[1] == 0 ? Acc(0) : softmax_exp(of_run[0] - largest);
      factors[r][run] = factor;
      sum += factor * of_run[1];
    }
    sum = warp_reduce(sum, sum_of);
    for (int run = lane; run < runs; run += kWarp) factors[r][run] /= sum;
  }
  __syncthreads();  // orders the factors before every thread reads them
  const int packs = partials.width / Q;
  const int64_t step = partials.rows * partials.width;  // to the next run
  for (int i = rank; i < rows * packs; i += kStepThreads) {
    const int r = i / packs, d = i % packs * Q;
    const Acc* of_row = partials.outs + (row0 + r) * partials.width + d;
    Acc sum[Q] = {};
    for (int run0 = 0; run0 < runs; run0 += kAhead) {
      uint4 bits[kAhead] = {};
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (run0 + u < runs) bits[u] = load_bits(of_row + (run0 + u) * step);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const Acc factor = run0 + u < runs ? factors[r][run0 + u] : Acc(0);
        Acc x[Q];
        unpack(TypeTag<Acc>{}, bits[u], x);
#pragma unroll
        for (int j = 0; j < Q; ++j) sum[j] += factor == 0 ? Acc(0) : factor * x[j];
      }
    }
#pragma unroll
    for (int j = 0; j < Q; ++j) out(r, d + j, sum[j]);
  }
}

// Whether this block is the last of its row and head to come here; `last` is shared memory. Then it
// sees what the others have written before.
__device__ __forceinline__ bool ends_row(const AttentionStepArgs& a, const StepWork& w, int& last) {
  // Each thread's partial results are visible on the device before the block counts itself.
  __threadfence();
  __syncthreads();  // orders all threads' fences before the count
  if (threadIdx.x == 0) {
    int32_t* counter = a.counters + static_cast<int64_t>(w.b) * a.NKV + w.head;
    last = atomicAdd(counter, 1) == w.runs - 1;
    // As it was found, for the next call; nothing orders the others' counts before a plain store.
    if (last) atomicExch(counter, 0);
  }
  __syncthreads();  // orders the count before every thread reads it
  if (!last) return false;
  __threadfence();  // orders the count before the reads of the other blocks' results
  return true;
}

// out(row, d, value) for all of the row's outputs, R query rows at a time.
template <int R, class Acc, class F>
__device__ void combine_rows(const AttentionStepArgs& a, const StepWork& w,
                             const StepPartials<Acc>& partials, Acc (*factors)[kMostRuns], F out) {
  const int rows = static_cast<int>(partials.rows), D = static_cast<int>(a.D);
  for (int row0 = 0; row0 < rows; row0 += R) {
    __syncthreads();  // orders the reads of the earlier rows' factors before these
    combine_runs<R>(partials, w.runs, row0, min(R, rows - row0), factors, [&](int r, int d, Acc x) {
      if (d < D) out(row0 + r, d, x);
    });
  }
}

}  // namespace seqkern::cuda
