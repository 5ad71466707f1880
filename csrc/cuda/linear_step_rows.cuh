// What the kernels of linear_step share: rows in packs of 16 bytes, their means and scales, and
// what follows a product.
#pragma once

#include "cuda/block.cuh"
#include "cuda/math.cuh"
#include "cuda/vec.cuh"
#include "ops/linear_step.h"

namespace seqkern::cuda {

// ---------------------------------------------------------------- packs

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

// ---------------------------------------------------------------- norm

// R rows of x, in shared memory, and what makes them the rows that are multiplied.
template <class T, int R>
struct StepRows {
  using Acc = AccOf<T>;
  // Where they begin. One beyond the last is not stored; the last is read in its place.
  const T* x[R];
  const T* residual[R];
  Acc mean[R], scale[R];
};

// Rows n0 and on; ordered before later reads by the caller's next barrier.
template <class T, int R>
__device__ __forceinline__ void find_rows(const LinearStepArgs& a, int64_t n0,
                                          StepRows<T, R>& rows) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= R) return;
  const int64_t n = n0 + r < a.N ? n0 + r : a.N - 1;
  rows.x[r] = row_at<T>(a.x, a.x_rows, n);
  rows.residual[r] = a.residual ? row_at<T>(a.residual, a.residual_rows, n) : nullptr;
}

// sums[r] of all threads of the block, in of_warp; ends in a barrier.
template <class Acc, int R, int kWarps>
__device__ void add_up(const Acc (&sums)[R], Acc (&of_warp)[R][kWarps]) {
  const int rank = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Acc sum = warp_reduce(sums[r], [](Acc x, Acc y) { return x + y; });
    if (rank % kWarp == 0) of_warp[r][rank / kWarp] = sum;
  }
  __syncthreads();  // orders the warps' sums before they are read
}

// Mean and scale of rows [first, first + R). All threads share each row, so that a long one costs
// the latency of few loads; ordered before later reads by the caller's next barrier.
template <int R, class T, int kRows, int kWarps>
__device__ void measure_rows(const LinearStepArgs& a, StepRows<T, kRows>& rows, int first,
                             AccOf<T> (&of_warp)[R][kWarps]) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<T>, kPacks = 4 / R;  // of each row, in flight
  constexpr int kThreads = kWarps * kWarp;
  const int K = static_cast<int>(a.K), rank = static_cast<int>(threadIdx.x);
  const auto total = [&](int r) {
    Acc sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[r][warp];
    return sum / static_cast<Acc>(K);
  };
  Acc mean[R] = {}, sums[R] = {};
  const T* x[R];
#pragma unroll
  for (int r = 0; r < R; ++r) x[r] = rows.x[first + r];
  const bool aligned = are_aligned(x, K);
  // f(v, r) summed over the elements v of each row r.
  const auto sum_of = [&](auto&& f) {
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] = 0;
    for (int k0 = rank * P; k0 < K; k0 += kPacks * kThreads * P) {
      uint4 bits[kPacks][R];
      load_packs(x, aligned, k0, kThreads * P, K, bits);
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
    add_up(sums, of_warp);
  };
  if (a.norm == StepNorm::kLayerNorm) {
    sum_of([](Acc v, int) { return v; });
#pragma unroll
    for (int r = 0; r < R; ++r) mean[r] = total(r);
    __syncthreads();  // orders the reads of the sums before the next ones
  }
  if (a.norm != StepNorm::kNone) {
    sum_of([&](Acc v, int r) { return (v - mean[r]) * (v - mean[r]); });
  }
  if (rank >= R) return;
  rows.mean[first + rank] = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r == rank) rows.mean[first + r] = mean[r];
  }
  rows.scale[first + rank] =
      a.norm == StepNorm::kNone
          ? Acc(1)
          : static_cast<Acc>(1 / ::sqrt(static_cast<double>(total(rank)) + a.eps));
}

// The norm's own parameters of inputs [k, k + P), as bits, which are under way while others are
// asked for.
template <class W>
struct NormPack {
  static constexpr int P = kPack<W>;
  uint4 bits[1][2] = {};
  bool scales, shifts;

  __device__ __forceinline__ NormPack(const LinearStepArgs& a, int k) {
    const W* weight = static_cast<const W*>(a.norm_weight);
    const W* bias = static_cast<const W*>(a.norm_bias);
    scales = weight != nullptr;
    shifts = bias != nullptr;
    // Where one is missing, the other is read in its place.
    const W* parameters[2] = {weight ? weight : bias, bias ? bias : weight};
    const int K = static_cast<int>(a.K);
    if (parameters[0]) load_packs(parameters, are_aligned(parameters, K), k, 0, K, bits);
  }
  __device__ __forceinline__ void values(AccOf<W> (&w)[P], AccOf<W> (&b)[P]) const {
    unpack(TypeTag<W>{}, bits[0][0], w);
    unpack(TypeTag<W>{}, bits[0][1], b);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (!scales) w[i] = 1;
      if (!shifts) b[i] = 0;
    }
  }
};

// An element as it is multiplied: the same bits in every kernel.
template <class Acc>
__device__ __forceinline__ Acc normalised(Acc x, Acc mean, Acc scale, Acc w, Acc b) {
  return ::fma((x - mean) * scale, w, b);
}

// ---------------------------------------------------------------- what follows a product

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

// Output m of a row from its sums (gated, of both halves of the weight), and where to.
template <class T, class W>
__device__ __forceinline__ void complete(const LinearStepArgs& a, int64_t n, int64_t m,
                                         const T* residual, AccOf<T> first, AccOf<T> second) {
  using Acc = AccOf<T>;
  const W* bias = static_cast<const W*>(a.bias);
  Acc y = first;
  if (bias) y += load1(bias + m);
  y = activate(a.activation, y);
  if (a.gated) y *= bias ? second + load1(bias + a.M + m) : second;
  if (a.residual) y += load1(residual + m);
  store1(static_cast<T*>(a.y) + n * a.M + m, y);
}

}  // namespace seqkern::cuda
