// The linear layer of a decoding step, in one launch: a warp makes the outputs of a few rows of the
// weight for a few rows of x. The rows of x are normalised by each block for itself, tile by tile,
// into shared memory: they are small and in second-level cache, the weight is neither.
#include <climits>

#include "common/errors.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/linear_step_mma.cuh"
#include "cuda/linear_step_rows.cuh"
#include "cuda/mixed.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Said so that the compiler uses the registers this leaves: on its own it stays at 64 and spills.
constexpr int kBlocksPerMultiprocessor = 4;
// Rows of the weight per warp: two outputs, or the halves of a gated one.
constexpr int kWeights = 2;
constexpr int kAhead = 4;  // packs of 16 bytes of each of them that a lane has under way

// Inputs at a time: what is under way.
template <class W>
inline constexpr int kTileK = kAhead * kWarp * kPack<W>;

// Input k of a tile lies in a plane of the 16-byte quads that a pack's inputs make: then lanes,
// which take neighbouring packs, read neighbouring quads.
template <class W, class Acc>
__device__ __forceinline__ constexpr int place(int k) {
  constexpr int P = kPack<W>, Q = kPack<Acc>;
  return (k % P / Q * (kTileK<W> / P) + k / P) * Q + k % Q;
}

// R rows of x at a time.
template <class T, class W, int R>
struct LinearStepShared {
  using Acc = AccOf<T>;
  alignas(16) Acc x[R][kTileK<W>];  // normalised, as place() says
  Acc of_warp[R][kWarps];           // sums
  StepRows<T, R> rows;
};

// Inputs k0 and on of the rows, normalised: a tile of them, zeros beyond K.
template <class T, class W, int R>
__device__ void load_tile(const LinearStepArgs& a, int k0, LinearStepShared<T, W, R>& shared) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<W>, Q = kPack<Acc>;
  const int K = static_cast<int>(a.K);
  const bool x_aligned = are_aligned(shared.rows.x, K);
  static_assert(kTileK<W> == kThreads * P);
  const int k = static_cast<int>(threadIdx.x) * P, left = K - k0 - k;  // of the thread's pack
  const NormPack<W> norm(a, k0 + k);
#pragma unroll
  for (int p = 0; p < P; p += kPack<T>) {
    uint4 of_x[1][R];
    load_packs(shared.rows.x, x_aligned, k0 + k + p, 0, K, of_x);
    AccOf<W> w[P], b[P];  // unpacked late: the parameters and x are under way together
    norm.values(w, b);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Acc mean = shared.rows.mean[r], scale = shared.rows.scale[r];
      Acc x[kPack<T>];
      unpack(TypeTag<T>{}, of_x[0][r], x);
#pragma unroll
      for (int i = 0; i < kPack<T>; i += Q) {
        Acc y[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          y[q] = normalised(x[i + q], mean, scale, Acc(w[p + i + q]), Acc(b[p + i + q]));
          if (p + i + q >= left) y[q] = 0;
        }
        *reinterpret_cast<uint4*>(&shared.x[r][place<W, Acc>(k + p + i)]) = pack(TypeTag<Acc>{}, y);
      }
    }
  }
}

template <class T, class W, int R>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    linear_step_kernel(const __grid_constant__ LinearStepArgs a) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<W>, Q = kPack<Acc>;
  LinearStepShared<T, W, R>& shared = cuda::shared<LinearStepShared<T, W, R>>();
  const int K = static_cast<int>(a.K), lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int outputs = a.gated ? 1 : kWeights;  // of a warp
  const int64_t m0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * outputs;
  const W* weight[kWeights];
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    // A row beyond the last one is not stored; the last is read in its place.
    const int64_t m = m0 + (a.gated ? 0 : j);
    const int64_t row = (m < a.M ? m : a.M - 1) + (a.gated ? j * a.M : 0);
    weight[j] = static_cast<const W*>(a.weight) + row * a.weight_stride;
  }
  const bool aligned = are_aligned(weight, K);

  for (int64_t n0 = 0; n0 < a.N; n0 += R) {
    Acc sum[kWeights][R] = {};
    if (n0 > 0) __syncthreads();  // orders the reads of the rows before, of their places
    find_rows(a, n0, shared.rows);
    __syncthreads();  // orders the rows' places before their reads
    for (int k0 = 0; k0 < K; k0 += kTileK<W>) {
      uint4 bits[kAhead][kWeights];
      load_packs(weight, aligned, k0 + lane * P, kWarp * P, K, bits);
      // With weights already under way: the first of them take as long as this.
      if (k0 == 0) measure_rows(a, shared.rows, 0, shared.of_warp);
      __syncthreads();  // orders means, and the reads of the tile before, before this tile
      load_tile(a, k0, shared);
      __syncthreads();  // orders the tile before its reads
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (k0 + u * kWarp * P >= K) break;
        Acc w[kWeights][P];
#pragma unroll
        for (int j = 0; j < kWeights; ++j) unpack(TypeTag<W>{}, bits[u][j], w[j]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int i = 0; i < P; i += Q) {
            Acc x[Q];
            unpack(TypeTag<Acc>{},
                   load_bits(&shared.x[r][place<W, Acc>((u * kWarp + lane) * P + i)]), x);
#pragma unroll
            for (int j = 0; j < kWeights; ++j) {
#pragma unroll
              for (int q = 0; q < Q; ++q) sum[j][r] += w[j][i + q] * x[q];
            }
          }
        }
      }
    }
    // A lane ends one output: of row `row`, from weight `of` (gated, from both).
    const int row = lane / kWeights, of = lane % kWeights;
    Acc out[kWeights] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int j = 0; j < kWeights; ++j) {
        const Acc total = warp_reduce(sum[j][r], [](Acc x, Acc y) { return x + y; });
        if (r == row) out[j] = total;
      }
    }
    if (row < R && of < outputs && n0 + row < a.N && m0 + of < a.M) {
      complete<T, W>(a, n0 + row, m0 + of, shared.rows.residual[row], of == 0 ? out[0] : out[1],
                     out[1]);
    }
  }
}

// f(TypeTag<T>, TypeTag<W>, a constant R, name) for each kernel.
template <class F>
void for_each_linear_step(F&& f) {
  for_each_mixed("linear_step", [&](auto tag, auto weight_tag, const std::string& name) {
    f(tag, weight_tag, std::integral_constant<int, 1>{}, name + " rows 1");
    f(tag, weight_tag, std::integral_constant<int, 4>{}, name + " rows 4");
  });
}

}  // namespace

int64_t linear_step_workspace(const LinearStepArgs& a) {
  // The device is asked about last: a step of few rows wants none.
  const int64_t bytes = linear_step_mma_workspace(a);
  return bytes > 0 && linear_step_takes_mma(a) ? bytes : 0;
}

void linear_step(const LinearStepArgs& a, Stream stream) {
  if (linear_step_takes_mma(a)) return linear_step_mma(a, stream);
  const int64_t of_block = kWarps * (a.gated ? 1 : kWeights);
  const int64_t blocks = ceil_div(a.M, of_block);
  if (blocks > INT_MAX || a.K > kMostElements) {
    throw_value_error("linear_step: weight must be at most [2^33, 2^31 - 2^13] on CUDA, got [" +
                      std::to_string(a.M) + ", " + std::to_string(a.K) + "]");
  }
  const LaunchConfig config{.name = "linear_step",
                            .grid = dim3(static_cast<unsigned>(blocks)),
                            .block = kThreads,
                            .stream = stream};
  for_each_linear_step([&](auto tag, auto weight_tag, auto rows, const std::string&) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    constexpr int R = decltype(rows)::value;
    if (a.dtype == dtype_of<T>() && a.weight_dtype == dtype_of<W>() && R == (a.N == 1 ? 1 : 4)) {
      launch(linear_step_kernel<T, W, R>, config, a);
    }
  });
}

void visit_linear_step_kernels(VisitKernel visit, void* context) {
  for_each_linear_step([&](auto tag, auto weight_tag, auto rows, const std::string& name) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    constexpr int R = decltype(rows)::value;
    visit(context, name.c_str(), reinterpret_cast<const void*>(&linear_step_kernel<T, W, R>));
  });
  visit_linear_step_mma_kernels(visit, context);
}

}  // namespace seqkern::cuda
