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
  Acc mean[R], scale[R];
  // Where the rows begin. One beyond the last is not stored; the last is read in its place.
  const T* of_x[R];
  const T* of_residual[R];
};

template <class T>
__device__ __forceinline__ const T* row_at(const void* base, const Rows& rows, int64_t n) {
  return static_cast<const T*>(base) + rows.offset(n);
}

// Packs at elements first + u * step of each row x [K], as bits; zeros beyond K. Where all packs
// lie whole at 16-byte boundaries, they are all asked for before the first is waited for.
template <int rows, int n, class X>
__device__ __forceinline__ void load_packs(const X* const (&x)[rows], bool aligned, int first,
                                           int step, int K, uint4 (&bits)[n][rows]) {
  constexpr int P = kPack<X>;
  if (aligned) {
#pragma unroll
    for (int u = 0; u < n; ++u) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const int k = first + u * step;
        bits[u][r] = k < K ? load_bits(x[r] + k) : uint4{};
      }
    }
    return;
  }
#pragma unroll
  for (int u = 0; u < n; ++u) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int k = first + u * step;
      AccOf<X> v[P];  // and back: nothing is rounded
#pragma unroll
      for (int i = 0; i < P; ++i) v[i] = k + i < K ? load1(x[r] + k + i) : AccOf<X>(0);
      bits[u][r] = pack(TypeTag<X>{}, v);
    }
  }
}

// Whether load_packs may take whole packs at multiples of their size.
template <int rows, class X>
__device__ __forceinline__ bool are_aligned(const X* const (&x)[rows], int K) {
  bool aligned = K % kPack<X> == 0;
#pragma unroll
  for (int r = 0; r < rows; ++r) aligned = aligned && is_aligned(x[r]);
  return aligned;
}

// sums[r] of all threads of the block, in shared.of_warp; ends in a barrier.
template <class T, class W, int R>
__device__ void add_up(const AccOf<T> (&sums)[R], LinearStepShared<T, W, R>& shared) {
  using Acc = AccOf<T>;
  const int rank = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Acc sum = warp_reduce(sums[r], [](Acc x, Acc y) { return x + y; });
    if (rank % kWarp == 0) shared.of_warp[r][rank / kWarp] = sum;
  }
  __syncthreads();  // orders the warps' sums before they are read
}

// Mean and scale of the rows. All threads share each row, so that a long one costs the
// latency of few loads; ordered before later reads by the caller's next barrier.
template <class T, class W, int R>
__device__ void measure_rows(const LinearStepArgs& a, LinearStepShared<T, W, R>& shared) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<T>, kPacks = 4 / R;  // of each row, in flight
  const int K = static_cast<int>(a.K), rank = static_cast<int>(threadIdx.x);
  const auto total = [&](int r) {
    Acc sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.of_warp[r][warp];
    return sum / static_cast<Acc>(K);
  };
  Acc mean[R] = {}, sums[R] = {};
  const bool aligned = are_aligned(shared.of_x, K);
  // f(v, r) summed over the elements v of each row r.
  const auto sum_of = [&](auto&& f) {
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] = 0;
    for (int k0 = rank * P; k0 < K; k0 += kPacks * kThreads * P) {
      uint4 bits[kPacks][R];
      load_packs(shared.of_x, aligned, k0, kThreads * P, K, bits);
#pragma unroll
      for (int u = 0; u < kPacks; ++u) {
        const int k = k0 + u * kThreads * P;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          Acc v[P];
          unpack(TypeTag<T>{}, bits[u][r], v);
#pragma unroll
          for (int i = 0; i < P; ++i) sums[r] += k + i < K ? f(v[i], r) : Acc(0);
        }
      }
    }
    add_up(sums, shared);
  };
  if (a.norm == StepNorm::kLayerNorm) {
    sum_of([](Acc x, int) { return x; });
#pragma unroll
    for (int r = 0; r < R; ++r) mean[r] = total(r);
    __syncthreads();  // orders the reads of the sums before the next ones
  }
  if (a.norm != StepNorm::kNone) {
    sum_of([&](Acc x, int r) { return (x - mean[r]) * (x - mean[r]); });
  }
  if (rank >= R) return;
  shared.mean[rank] = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r == rank) shared.mean[r] = mean[r];
  }
  shared.scale[rank] = a.norm == StepNorm::kNone
                           ? Acc(1)
                           : static_cast<Acc>(1 / ::sqrt(static_cast<double>(total(rank)) + a.eps));
}

// Inputs k0 and on of the rows, normalised: a tile of them, zeros beyond K.
template <class T, class W, int R>
__device__ void load_tile(const LinearStepArgs& a, int k0, LinearStepShared<T, W, R>& shared) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<W>, Q = kPack<Acc>;
  const int K = static_cast<int>(a.K);
  const W* weight = static_cast<const W*>(a.norm_weight);
  const W* bias = static_cast<const W*>(a.norm_bias);
  // Where one is missing, the other is read in its place.
  const W* parameters[2] = {weight ? weight : bias, bias ? bias : weight};
  const bool aligned = are_aligned(parameters, K), x_aligned = are_aligned(shared.of_x, K);
  static_assert(kTileK<W> == kThreads * P);
  const int k = static_cast<int>(threadIdx.x) * P, left = K - k0 - k;  // of the thread's pack
  uint4 of_norm[1][2] = {};
  if (parameters[0]) load_packs(parameters, aligned, k0 + k, 0, K, of_norm);
#pragma unroll
  for (int p = 0; p < P; p += kPack<T>) {
    uint4 of_x[1][R];
    load_packs(shared.of_x, x_aligned, k0 + k + p, 0, K, of_x);
    Acc w[P], b[P];  // unpacked late: the parameters and x are under way together
    unpack(TypeTag<W>{}, of_norm[0][0], w);
    unpack(TypeTag<W>{}, of_norm[0][1], b);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Acc mean = shared.mean[r], scale = shared.scale[r];
      Acc x[kPack<T>];
      unpack(TypeTag<T>{}, of_x[0][r], x);
#pragma unroll
      for (int i = 0; i < kPack<T>; i += Q) {
        Acc y[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          y[q] = (x[i + q] - mean) * scale;
          if (weight) y[q] *= w[p + i + q];
          if (bias) y[q] += b[p + i + q];
          if (p + i + q >= left) y[q] = 0;
        }
        *reinterpret_cast<uint4*>(&shared.x[r][place<W, Acc>(k + p + i)]) = pack(TypeTag<Acc>{}, y);
      }
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
  const W* bias = static_cast<const W*>(a.bias);
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
    if (static_cast<int>(threadIdx.x) < R) {
      const int r = static_cast<int>(threadIdx.x);
      const int64_t n = n0 + r < a.N ? n0 + r : a.N - 1;
      shared.of_x[r] = row_at<T>(a.x, a.x_rows, n);
      shared.of_residual[r] = a.residual ? row_at<T>(a.residual, a.residual_rows, n) : nullptr;
    }
    __syncthreads();  // orders the rows' places before their reads
    for (int k0 = 0; k0 < K; k0 += kTileK<W>) {
      uint4 bits[kAhead][kWeights];
      load_packs(weight, aligned, k0 + lane * P, kWarp * P, K, bits);
      // With weights already under way: the first of them take as long as this.
      if (k0 == 0) measure_rows(a, shared);
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
      const int64_t m = m0 + of;
      Acc y = of == 0 ? out[0] : out[1];
      if (bias) y += load1(bias + m);
      y = activate(a.activation, y);
      if (a.gated) y *= bias ? out[1] + load1(bias + a.M + m) : out[1];
      if (a.residual) y += load1(shared.of_residual[row] + m);
      store1(static_cast<T*>(a.y) + (n0 + row) * a.M + m, y);
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

void linear_step(const LinearStepArgs& a, Stream stream) {
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
}

}  // namespace seqkern::cuda
