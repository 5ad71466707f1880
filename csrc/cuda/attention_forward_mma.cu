// Causal attention on tensor cores, forward: a block takes a tile of queries and walks the keys
// they see. Derivation and layout: docs/math/attention_cuda.md.
#include "cuda/attention_mma.cuh"

namespace seqkern::cuda {
namespace {

// Warps split the queries only: then a row's maximum and sum are over four lanes, and P stays in
// registers. 32 queries per warp (16 at width 256) use each fragment of K and V twice.
template <int kWidth, bool kOptions>
struct Shape {
  static constexpr int kThreads = 128;
  static constexpr int kQueries = kWidth <= 128 ? 128 : 64;
  static constexpr int kKeys = kOptions && kWidth == 128 ? 32 : 64;
  static constexpr int M = kQueries / 64;  // blocks of 16 queries per warp
  static constexpr int N = kKeys / 8;
  static constexpr unsigned kSharedBytes = (kQueries + 2 * kKeys) * kWidth * 2;
};

// Of the lane's rows, M of them 16 apart and another M eight below.
template <int M>
struct Softmax {
  float max[M][2];  // of the scores times log2(e)
  float sum[M][2];  // of the lane's own columns
};

__device__ __forceinline__ float max_of_row(float x) {
  x = max_of(x, __shfl_xor_sync(kAllLanes, x, 1));
  return max_of(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Turns products into exp2(score - maximum), and moves what was summed before to the new maximum.
// The scaled maximum is rounded before it is subtracted, once for the row: its error then is in
// every p and in the sum alike.
template <bool kOptions, bool kMask, int M, int N, int O>
__device__ __forceinline__ void take_tile(float (&x)[M][N][4], Softmax<M>& softmax,
                                          float (&out)[M][O][4], const Scores<float, true>& scores,
                                          const Band& band, int offset, int row0, int column0) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half + lane / 4;
      const int mine = column0 + lane % 4 * 2;  // of the lane's columns, the first
      const int lower = band.lower(row) - mine, upper = band.upper(row) - mine;
      float tile_max = -infinity<float>();
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const int column = 8 * n + e % 2;
          if constexpr (kOptions) {
            x[m][n][e] = scores.of(x[m][n][e], row + offset - mine - column);
          }
          if (kMask && (column < lower || column >= upper)) x[m][n][e] = -infinity<float>();
          tile_max = max_of(tile_max, x[m][n][e]);
        }
      }
      tile_max = max_of_row(tile_max);
      if constexpr (!kOptions) tile_max *= scores.factor;
      const float before = softmax.max[m][half];
      const float now = max_of(before, tile_max);
      // Nothing seen yet: a finite stand-in, for -inf - -inf is NaN.
      const float shift = now == -infinity<float>() ? 0.0f : now;
      const float keep = ex2_approx(before - shift);
      softmax.max[m][half] = now;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          x[m][n][e] = kOptions ? ex2_approx(x[m][n][e] - shift)
                                : ex2_approx(fmaf(x[m][n][e], scores.factor, -shift));
          sum += x[m][n][e];
        }
      }
      softmax.sum[m][half] = softmax.sum[m][half] * keep + sum;
#pragma unroll
      for (int n = 0; n < O; ++n) {
        out[m][n][2 * half] *= keep;
        out[m][n][2 * half + 1] *= keep;
      }
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void drop(float (&p)[M][N][4], const Dropout& dropout, int row,
                                     int column) {
  constexpr int kDraws = N < 8 ? N : 8;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n0 = 0; n0 < N; n0 += kDraws) {
      const KeepOfQueryRows<kDraws> keep(dropout, row + 16 * m, column + 8 * n0);
#pragma unroll
      for (int n = 0; n < kDraws; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) p[m][n0 + n][e] = keep.of(n, e) ? p[m][n0 + n][e] : 0.0f;
      }
    }
  }
}

template <class T, int kWidth, bool kOptions>
__global__ void __launch_bounds__(Shape<kWidth, kOptions>::kThreads)
    attention_forward_mma_kernel(const __grid_constant__ AttentionForwardArgs a) {
  using S = Shape<kWidth, kOptions>;
  const AttentionInputs& in = a.in;
  const Work& work = find_work<false, S::kQueries>(in);
  if (!work.exists) return;
  const Segment& s = work.segment;
  const int i0 = work.first;

  T* q_tile = dynamic_shared<T>();
  T* k_tile = q_tile + S::kQueries * kWidth;
  T* v_tile = k_tile + S::kKeys * kWidth;
  const auto q = rows_of<const T>(in.q, in.q_strides, in.D, s.b, work.head, s.q_row + i0);
  Walk<T>& keys = shared<Walk<T>>();
  if (threadIdx.x == 0) {
    const int h_kv = work.head / static_cast<int>(in.NH / in.NKV);
    const auto rows = [&](const void* base, const HeadStrides& strides) {
      return WalkedRows<T>{rows_of<const T>(base, strides, in.D, s.b, h_kv, s.k_row), s.key_lo,
                           s.length};
    };
    keys.set(rows(in.k, in.k_strides), rows(in.v, in.v_strides), kWidth);
  }
  __syncthreads();  // orders the write before every thread's reads
  const bool whole = keys.whole_to > 0;
  const auto load_keys = [&](T* tile, const WalkedRows<T>& rows, int j0, auto mask) {
    // A tile that needs no mask is within.
    if (whole && (!mask.value || keys.is_whole(j0, S::kKeys))) {
      copy_tile<kWidth, S::kKeys, S::kThreads>(tile, rows.all.first, rows.all.stride, j0);
    } else {
      load_tile<kWidth, S::kKeys, S::kThreads>(tile, rows, j0);
    }
    cp_async_commit();
  };

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16 * S::M;
  const Scores<float, true> scores(in, s.b, work.head, kLog2E);
  const Dropout dropout(in, s, work.head);
  const Band band = band_of<false>(s, window_of(in));
  const TileOrder order(band, i0, i0 + work.alive - 1, S::kKeys);
  const int steps = work.alive > 0 ? order.count() : 0;

  float out[S::M][kWidth / 8][4];
  clear(out);
  Softmax<S::M> softmax;
#pragma unroll
  for (int m = 0; m < S::M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.max[m][half] = -infinity<float>();
      softmax.sum[m][half] = 0;
    }
  }

  if (steps > 0) {
    load_tile<kWidth, S::kQueries, S::kThreads>(q_tile, q, 0, work.alive);
    load_keys(k_tile, keys.first, order.at(0) * S::kKeys, std::true_type{});
  }
  // K and V have a buffer each: while one is multiplied, the other is on its way.
  const auto take_tile_at = [&](int j0, int next_j0, auto mask) {
    cp_async_wait<0>();
    // Orders this step's K (and Q) before it is read, and the last step's reads of V before V is
    // written.
    __syncthreads();
    load_keys(v_tile, keys.second, j0, mask);
    const int row0 = work.first + warp_row;
    // Anew: what it is made of is in shared and constant memory.
    const Band seen = band_of<false>(s, window_of(in));
    // Not every warp's rows meet what the block's rows meet.
    const bool meets = !mask.value || seen.meets(row0, row0 + 16 * S::M - 1, j0, j0 + S::kKeys);
    uint32_t p[S::M][S::N / 2][4];
    if (meets) {
      float x[S::M][S::N][4];
      clear(x);
      multiply_rows<kWidth>(x, q_tile, warp_row, k_tile, 0);
      take_tile<kOptions, mask.value>(x, softmax, out, scores, seen, s.offset, row0, j0);
      if constexpr (kOptions) {
        if (dropout.on) drop(x, dropout, row0, j0);
      }
      as_operand<T>(x, p);
    }
    cp_async_wait<0>();
    // Orders V before it is read, and the reads of K before K is written.
    __syncthreads();
    if (next_j0 >= 0) load_keys(k_tile, keys.first, next_j0, mask);
    if (meets) multiply_columns<kWidth>(out, p, v_tile, 0);
  };
  int j0 = steps > 0 ? order.at(0) * S::kKeys : 0;
  for (int step = 0; step < order.masked() && step < steps; ++step) {
    const int next = step + 1 < steps ? order.at(step + 1) * S::kKeys : -1;
    take_tile_at(j0, next, std::true_type{});
    j0 = next;
  }
  // From here on neighbours, and the first of them is the last.
  const int last = work.alive > 0 ? order.full_begin * S::kKeys : INT_MAX;
  while (j0 >= last) {
    const int next = j0 > last ? j0 - S::kKeys : -1;
    take_tile_at(j0, next, std::false_type{});
    j0 = next;
  }

  const float kept = static_cast<float>(keep_scale(in));
  float* lse = static_cast<float*>(a.lse) + row_number(in, s.b, work.head, s.q_row + work.first);
#pragma unroll
  for (int m = 0; m < S::M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + lane / 4;
      const float sum = sum_of_row(softmax.sum[m][half]);
      const bool empty = row >= work.alive || sum == 0;
      const float inverse = kept / sum;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          out[m][n][e] = empty ? 0.0f : out[m][n][e] * inverse;
      }
      if (lane % 4 == 0 && row < work.rows) {
        lse[row] = empty ? -infinity<float>() : log_sum(softmax.max[m][half], kLn2, sum);
      }
    }
  }
  // Each warp's own rows of Q become its rows of the output, so that whole chunks are stored.
  __syncwarp();  // orders the lanes' reads of Q before the writes
  to_tile<kWidth>(q_tile, out, 1.0f, warp_row);
  __syncwarp();  // orders the writes before the lanes read chunks of others
  store_tile<kWidth>(q_tile,
                     rows_of<T>(a.out, a.out_strides, in.D, s.b, work.head, s.q_row + work.first),
                     warp_row, min(work.rows, warp_row + 16 * S::M), lane, kWarp);
}

}  // namespace

// ---------------------------------------------------------------- launcher

void attention_forward_mma(const AttentionForwardArgs& a, Stream stream) {
  specialize_mma(a.in,
                 [&]<class T, int kWidth, class Options>(TypeTag<T>, Constant<kWidth>, Options) {
                   using S = Shape<kWidth, Options::value>;
                   const unsigned grid = grid_of("attention", a.in, a.in.NH, a.in.Tq, S::kQueries);
                   if (grid == 0) return;
                   launch(attention_forward_mma_kernel<T, kWidth, Options::value>,
                          {.name = "attention",
                           .grid = grid,
                           .block = S::kThreads,
                           .smem = S::kSharedBytes,
                           .stream = stream},
                          a);
                 });
}

void visit_attention_forward_mma_kernels(VisitKernel visit, void* context) {
  for_each_mma([&]<class T, int kWidth, class Options>(TypeTag<T>, Constant<kWidth>, Options,
                                                       const std::string& options) {
    visit(context, ("attention_forward_mma" + options).c_str(),
          reinterpret_cast<const void*>(attention_forward_mma_kernel<T, kWidth, Options::value>));
  });
}

}  // namespace seqkern::cuda
