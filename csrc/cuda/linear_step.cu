// The linear layer of a decoding step, in one launch: a warp makes the outputs of a few rows of the
// weight for a few rows of x. The rows of x are normalised by each block for itself, tile by tile,
// into shared memory: they are small and in second-level cache, the weight is neither.
#include <climits>

#include "common/errors.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/mixed.cuh"
#include "cuda/vec.cuh"
#include "ops/linear_step.h"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Said so that the compiler uses the registers this leaves: on its own it stays at 64 and spills.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kRows = 4;  // of x at a time
constexpr int kWeights =
    2;  // rows of the weight per warp: two outputs, or the halves of a gated one
constexpr int kTileK = 1024;  // inputs at a time

template <class Acc>
struct LinearStepShared {
  Acc x[kRows][kTileK];           // normalised
  Acc mean[kRows], scale[kRows];  // of the rows
};

template <class T>
__device__ __forceinline__ const T* row_at(const void* base, const Rows& rows, int64_t n) {
  return static_cast<const T*>(base) + rows.offset(n);
}

// Mean and scale of the rows from n0 on, a warp per row.
template <class T, class Acc>
__device__ void measure_rows(const LinearStepArgs& a, int64_t n0, int rows,
                             LinearStepShared<Acc>& shared) {
  const int K = static_cast<int>(a.K), lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto sum = [](Acc x, Acc y) { return x + y; };
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < rows; r += kWarps) {
    const T* x = row_at<T>(a.x, a.x_rows, n0 + r);
    Acc mean = 0, scale = 1;
    if (a.norm == StepNorm::kLayerNorm) {
      for (int k = lane; k < K; k += kWarp) mean += load1(x + k);
      mean = warp_reduce(mean, sum) / static_cast<Acc>(K);
    }
    if (a.norm != StepNorm::kNone) {
      Acc square = 0;
      for (int k = lane; k < K; k += kWarp) {
        const Acc d = load1(x + k) - mean;
        square += d * d;
      }
      square = warp_reduce(square, sum) / static_cast<Acc>(K);
      scale = static_cast<Acc>(1 / ::sqrt(static_cast<double>(square) + a.eps));
    }
    if (lane == 0) {
      shared.mean[r] = mean;
      shared.scale[r] = scale;
    }
  }
}

// Inputs [k0, k0 + width) of the rows.
template <class T, class W, class Acc>
__device__ void load_tile(const LinearStepArgs& a, int64_t n0, int rows, int k0, int width,
                          LinearStepShared<Acc>& shared) {
  const W* weight = static_cast<const W*>(a.norm_weight);
  const W* bias = static_cast<const W*>(a.norm_bias);
  for (int r = 0; r < rows; ++r) {
    const T* x = row_at<T>(a.x, a.x_rows, n0 + r) + k0;
    const Acc mean = shared.mean[r], scale = shared.scale[r];
    for (int k = static_cast<int>(threadIdx.x); k < width; k += kThreads) {
      Acc y = (load1(x + k) - mean) * scale;
      if (weight) y *= load1(weight + k0 + k);
      if (bias) y += load1(bias + k0 + k);
      shared.x[r][k] = y;
    }
  }
}

template <class Acc>
__device__ __forceinline__ Acc activate(Activation activation, Acc x) {
  switch (activation) {
    case Activation::kGelu:
      return Acc(0.5) * x * erfc_of(-x * Acc(0.70710678118654752440));
    case Activation::kGeluTanh:
      return x * sigmoid_of(Acc(1.59576912160573071176) * (x + Acc(0.044715) * x * x * x));
    case Activation::kSilu:
      return x * sigmoid_of(x);
    case Activation::kRelu:
      return x < Acc(0) ? Acc(0) : x;
    default:
      return x;
  }
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    linear_step_kernel(const __grid_constant__ LinearStepArgs a) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<W>;
  LinearStepShared<Acc>& shared = cuda::shared<LinearStepShared<Acc>>();
  const int K = static_cast<int>(a.K), lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int outputs = a.gated ? 1 : kWeights;  // of a warp
  const int64_t m0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * outputs;
  const W* bias = static_cast<const W*>(a.bias);
  int64_t weight_row[kWeights];
  const W* weight[kWeights];
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    // A row beyond the last one is not stored; the last is read in its place.
    const int64_t m = m0 + (a.gated ? 0 : j);
    weight_row[j] = (m < a.M ? m : a.M - 1) + (a.gated ? j * a.M : 0);
    weight[j] = static_cast<const W*>(a.weight) + weight_row[j] * a.weight_stride;
  }

  for (int64_t n0 = 0; n0 < a.N; n0 += kRows) {
    const int rows = static_cast<int>(a.N - n0 < kRows ? a.N - n0 : kRows);
    Acc sum[kWeights][kRows] = {};
    __syncthreads();  // orders the reads of the rows before, of their mean, before these
    measure_rows<T>(a, n0, rows, shared);
    for (int k0 = 0; k0 < K; k0 += kTileK) {
      const int width = min(kTileK, K - k0);
      __syncthreads();  // orders means, and the reads of the tile before, before this tile
      load_tile<T, W>(a, n0, rows, k0, width, shared);
      __syncthreads();  // orders the tile before its reads
      for (int k = lane * P; k < width; k += kWarp * P) {
#pragma unroll
        for (int j = 0; j < kWeights; ++j) {
          Acc w[P];
          if (k + P <= width) {
            load_run<P>(weight[j] + k0 + k, w);
          } else {
#pragma unroll
            for (int i = 0; i < P; ++i) {
              w[i] = k + i < width ? static_cast<Acc>(load1(weight[j] + k0 + k + i)) : Acc(0);
            }
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (r >= rows) break;
#pragma unroll
            for (int i = 0; i < P; ++i) {
              if (k + i < width) sum[j][r] += w[i] * shared.x[r][k + i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      Acc out[kWeights];
#pragma unroll
      for (int j = 0; j < kWeights; ++j) {
        out[j] = warp_reduce(sum[j][r], [](Acc x, Acc y) { return x + y; });
        if (bias) out[j] += load1(bias + weight_row[j]);
      }
      if (a.gated) out[0] = activate(a.activation, out[0]) * out[1];
#pragma unroll
      for (int j = 0; j < kWeights; ++j) {
        const int64_t m = m0 + j;
        if (lane != j || j >= outputs || m >= a.M) continue;
        Acc y = a.gated ? out[j] : activate(a.activation, out[j]);
        if (a.residual) y += load1(row_at<T>(a.residual, a.residual_rows, n0 + r) + m);
        store1(static_cast<T*>(a.y) + (n0 + r) * a.M + m, y);
      }
    }
  }
}

}  // namespace

void linear_step(const LinearStepArgs& a, Stream stream) {
  const int64_t of_block = kWarps * (a.gated ? 1 : kWeights);
  const int64_t blocks = ceil_div(a.M, of_block);
  if (blocks > INT_MAX || a.K > INT_MAX - kTileK) {
    throw_value_error("linear_step: weight must be at most [2^33, 2^31 - 1025] on CUDA, got [" +
                      std::to_string(a.M) + ", " + std::to_string(a.K) + "]");
  }
  const LaunchConfig config{.name = "linear_step",
                            .grid = dim3(static_cast<unsigned>(blocks)),
                            .block = kThreads,
                            .stream = stream};
  for_each_mixed("linear_step", [&](auto tag, auto weight_tag, const std::string&) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    if (a.dtype == dtype_of<T>() && a.weight_dtype == dtype_of<W>()) {
      launch(linear_step_kernel<T, W>, config, a);
    }
  });
}

void visit_linear_step_kernels(VisitKernel visit, void* context) {
  for_each_mixed("linear_step", [&](auto tag, auto weight_tag, const std::string& name) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    visit(context, name.c_str(), reinterpret_cast<const void*>(&linear_step_kernel<T, W>));
  });
}

}  // namespace seqkern::cuda
