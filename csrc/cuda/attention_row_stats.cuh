// What the backward of attention on tensor cores needs of each query row, from its output and
// log-sum-exp: a kernel that runs before the sums.
#pragma once

#include "cuda/attention_mma.cuh"

namespace seqkern::cuda {

inline constexpr int kStatsRows = 64;
inline constexpr int kStatsThreads = 128;

// delta is the diagonal of dout out^T, by the products that make dP of dout v^T.
template <class T, int kWidth>
__global__ void __launch_bounds__(kStatsThreads)
    attention_row_stats_mma_kernel(const __grid_constant__ AttentionBackwardArgs a) {
  const AttentionInputs& in = a.in;
  const int tiles = ceil_div(static_cast<int>(in.Tq), kStatsRows);
  const int block = static_cast<int>(blockIdx.x);
  const int t0 = block % tiles * kStatsRows;
  const int h = block / tiles % static_cast<int>(in.NH);
  const int b = block / tiles / static_cast<int>(in.NH);
  const int rows = min(kStatsRows, static_cast<int>(in.Tq) - t0);
  T* dout_tile = dynamic_shared<T>();
  T* out_tile = dout_tile + kStatsRows * kWidth;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16;
  float x[1][2][4];
  clear(x);
  if (a.dout) {
    load_tile<kWidth, kStatsRows, kStatsThreads>(
        dout_tile, rows_of<const T>(a.dout, a.dout_strides, in.D, b, h, t0), 0, rows);
    load_tile<kWidth, kStatsRows, kStatsThreads>(
        out_tile, rows_of<const T>(a.out, a.out_strides, in.D, b, h, t0), 0, rows);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // orders the copies before the other threads' reads
    multiply_rows<kWidth>(x, dout_tile, warp_row, out_tile, warp_row);
  }
  // Lane 4 g + g / 2 holds row g's and row g + 8's elements of the diagonal.
  const int g = lane / 4;
  if (lane % 4 != g / 2) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + 8 * half + g;
    if (row >= rows) continue;
    const int64_t n = row_number(in, b, h, t0 + row);
    const float lse = static_cast<const float*>(a.lse)[n];
    const bool empty = lse == -infinity<float>();
    const float diagonal = g % 2 ? x[0][half][2 * half + 1] : x[0][half][2 * half];
    const float dlse = a.dlse ? static_cast<const float*>(a.dlse)[n] : 0.0f;
    static_cast<RowStats<float>*>(a.workspace)[n] = {empty ? infinity<float>() : lse * kLog2E,
                                                     empty ? 0.0f : diagonal - dlse};
  }
}

template <class T, int kWidth>
void launch_row_stats(const AttentionBackwardArgs& a, Stream stream) {
  const int64_t blocks = a.in.B * a.in.NH * ceil_div<int64_t>(a.in.Tq, kStatsRows);
  if (blocks == 0) return;
  // Their number fits: no device has memory for the workspace of 2^37 rows.
  launch(attention_row_stats_mma_kernel<T, kWidth>,
         {.name = "attention_backward",
          .grid = static_cast<unsigned>(blocks),
          .block = kStatsThreads,
          .smem = 2 * kStatsRows * kWidth * sizeof(T),
          .stream = stream},
         a);
}

}  // namespace seqkern::cuda
