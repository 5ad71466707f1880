// The products of recurrent layers that run with launches per step, whatever the cell.
#pragma once

#include "common/host_device.h"
#include "cuda/launch.cuh"
#include "cuda/recurrent.cuh"

namespace seqkern::cuda {

// ---------------------------------------------------------------- forward: a warp per output

inline constexpr int kStepRows = 8;   // batch rows of a warp
inline constexpr int kStepWarps = 4;  // per block

// What a warp works on: one output (a unit, or an element of a projection) of kStepRows rows.
struct StepTask {
  __device__ StepTask(int64_t outputs, int64_t B) {
    const int64_t tiles = (outputs + kStepWarps - 1) / kStepWarps;
    j = blockIdx.x % tiles * kStepWarps + threadIdx.x / kWarp;
    b = blockIdx.x / tiles * kStepRows;
    rows = static_cast<int>(B - b < kStepRows ? B - b : int64_t{kStepRows});
  }
  int64_t j;  // may be past the last output
  int64_t b;
  int rows;
};

inline unsigned step_blocks(int64_t outputs, int64_t B) {
  return static_cast<unsigned>(ceil_div<int64_t>(outputs, kStepWarps) *
                               ceil_div<int64_t>(B, kStepRows));
}

// Lane r gets in out[q] the product of weight row q [K] with x_of(b + r) [K], zero where that is
// null. Each is summed in an order that no other row has a part in.
template <int kOutputs, class T, class RowOf>
__device__ __forceinline__ void step_products(const T* const (&w)[kOutputs], RowOf x_of, int64_t K,
                                              const StepTask& task, AccOf<T> (&out)[kOutputs]) {
  using Acc = AccOf<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  decltype(x_of(task.b)) x[kStepRows];
#pragma unroll
  for (int row = 0; row < kStepRows; ++row) {
    x[row] = row < task.rows ? x_of(task.b + row) : nullptr;
  }
  Acc sum[kOutputs][kStepRows] = {};
  for (int64_t k = lane; k < K; k += kWarp) {
    Acc weight[kOutputs];
#pragma unroll
    for (int q = 0; q < kOutputs; ++q) weight[q] = load1(w[q] + k);
#pragma unroll
    for (int row = 0; row < kStepRows; ++row) {
      if (!x[row]) continue;
      const Acc value = load1(x[row] + k);
#pragma unroll
      for (int q = 0; q < kOutputs; ++q) sum[q][row] += weight[q] * value;
    }
  }
#pragma unroll
  for (int row = 0; row < kStepRows; ++row) {
    if (row >= task.rows) break;
#pragma unroll
    for (int q = 0; q < kOutputs; ++q) {
      const Acc total = warp_reduce(sum[q][row], Add{});
      if (lane == row) out[q] = total;
    }
  }
}

// ---------------------------------------------------------------- backward: a thread per element

inline constexpr int kStepThreads = 256;
inline constexpr int kStepSlices = kStepThreads / kWarp;  // parts of a product's sum, a warp each
static_assert(kStepSlices == kStepRows);

__device__ __forceinline__ int64_t step_thread() {
  return static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
}

inline int64_t step_product_blocks(int64_t K, int64_t B) {
  return ceil_div<int64_t>(K, kWarp) * ceil_div<int64_t>(B, kStepRows);
}

// out [B, K] = v W of the rows that have step s: v [J] at the row's time, W [J, K]. A block takes
// kWarp columns of kStepRows rows; its warps take every kStepSlices-th term of the sums.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    step_product_kernel(RecurrentInputs r, const T* v, SequenceStrides v_strides, const T* w,
                        AccOf<T>* out, int64_t J, int64_t K, int64_t s) {
  using Acc = AccOf<T>;
  struct Partial {
    Acc x[kStepSlices][kStepRows][kWarp];
  };
  Partial& partial = shared<Partial>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int slice = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tiles = (K + kWarp - 1) / kWarp;
  const int64_t k = blockIdx.x % tiles * kWarp + lane;
  const int64_t b0 = blockIdx.x / tiles * kStepRows;
  const T* v_b[kStepRows];  // null for rows without the step
#pragma unroll
  for (int row = 0; row < kStepRows; ++row) {
    v_b[row] = nullptr;
    if (b0 + row >= r.B) continue;
    const int64_t L = length_of(r, b0 + row);
    if (s < L) v_b[row] = v + time_of(r, L, s) * v_strides.t + (b0 + row) * v_strides.b;
  }
  Acc sum[kStepRows] = {};
  if (k < K) {
    for (int64_t j = slice; j < J; j += kStepSlices) {
      const Acc weight = load1(w + j * K + k);
#pragma unroll
      for (int row = 0; row < kStepRows; ++row) {
        if (v_b[row]) sum[row] += load1(v_b[row] + j) * weight;
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kStepRows; ++row) partial.x[slice][row][lane] = sum[row];
  // Orders the parts before the sums over them.
  __syncthreads();
  const int row = slice;  // as many slices as rows
  if (b0 + row >= r.B || k >= K || s >= length_of(r, b0 + row)) return;
  Acc total = 0;
#pragma unroll
  for (int part = 0; part < kStepSlices; ++part) total += partial.x[part][row][lane];
  out[(b0 + row) * K + k] = total;
}

}  // namespace seqkern::cuda
