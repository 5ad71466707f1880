// Reductions over a warp and a block, in an order fixed by the thread numbers: the same input gives
// the same bits, run after run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"

namespace seqkern::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// `other lane's x`; structs have an overload of their own beside their definition.
__device__ __forceinline__ float shuffle_down(float x, int delta) {
  return __shfl_down_sync(kAllLanes, x, delta);
}
__device__ __forceinline__ double shuffle_down(double x, int delta) {
  return __shfl_down_sync(kAllLanes, x, delta);
}
__device__ __forceinline__ int shuffle_down(int x, int delta) {
  return __shfl_down_sync(kAllLanes, x, delta);
}
__device__ __forceinline__ int broadcast(int x) { return __shfl_sync(kAllLanes, x, 0); }
__device__ __forceinline__ float broadcast(float x) { return __shfl_sync(kAllLanes, x, 0); }
__device__ __forceinline__ double broadcast(double x) { return __shfl_sync(kAllLanes, x, 0); }

// merge over the warp's lanes, as a tree towards lane 0; all lanes get lane 0's bits (with an
// exchange in both directions each lane could round its own way, since a contracted a * b + c * d
// is not symmetric).
template <class X, class Merge>
__device__ __forceinline__ X warp_reduce(X x, Merge merge) {
#pragma unroll
  for (int delta = kWarp / 2; delta > 0; delta /= 2) x = merge(x, shuffle_down(x, delta));
  return broadcast(x);
}

// The largest of the lanes' numbers, in one instruction.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int delta = kWarp / 2; delta > 0; delta /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, delta);
    x = x > other ? x : other;
  }
  return x;
#else
  return __reduce_max_sync(kAllLanes, x);
#endif
}

// The threads that share a row. This is the seam for rows that one block is too slow for: a group
// of a cluster's blocks has the same rank(), size() and reduce(), the last through distributed
// shared memory.

struct WarpGroup {
  static constexpr int kMaxThreads = 128;

  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ __forceinline__ int size() const { return kWarp; }
  __device__ __forceinline__ int64_t row() const {
    return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  }

  template <class X, class Merge>
  __device__ __forceinline__ X reduce(X x, X, Merge merge) const {
    return warp_reduce(x, merge);
  }
};

struct BlockGroup {
  // So few that several blocks share a multiprocessor: some stream while others begin or reduce.
  static constexpr int kMaxThreads = 256;
  // Packs of a row per thread at least, where more than the fewest threads take it: two batches of
  // loads.
  static constexpr int kLeastPacks = 8;

  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ int64_t row() const { return blockIdx.x; }

  // merge over the block, with merge(x, identity) = x; every thread gets the result.
  template <class X, class Merge>
  __device__ __forceinline__ X reduce(X x, X identity, Merge merge) const {
    struct Scratch {
      X of_warp[kWarp];
    };
    Scratch& scratch = shared<Scratch>();
    const int lane = rank() % kWarp;
    x = warp_reduce(x, merge);
    // Orders the reads of an earlier reduce before the writes of this one.
    __syncthreads();
    if (lane == 0) scratch.of_warp[rank() / kWarp] = x;
    // Orders the warps' writes before every thread's reads.
    __syncthreads();
    // Each warp repeats the last step for itself: no third barrier to hand the result out.
    return warp_reduce(lane < size() / kWarp ? scratch.of_warp[lane] : identity, merge);
  }
};

}  // namespace seqkern::cuda
