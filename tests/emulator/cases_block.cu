// Shared memory and barriers of a block.
#include "cases.h"
#include "cuda/launch.cuh"

namespace seqkern::emulator {
namespace {

using cuda::dynamic_shared;
using cuda::launch;
using cuda::shared;

constexpr int kThreads = 96;

struct Values {
  float x[kThreads];
};

// Each thread hands its number to the one before it.
template <bool kBarrier>
__global__ void exchange(float* out) {
  Values& s = shared<Values>();
  const int t = static_cast<int>(threadIdx.x);
  s.x[t] = static_cast<float>(t);
  if constexpr (kBarrier) __syncthreads();  // orders the writes before the neighbours' reads
  out[t] = s.x[(t + 1) % kThreads];
}

// Rotates twice; without the second barrier a fast thread overwrites what a slow one has yet to
// read.
template <bool kBarrier>
__global__ void rotate(float* out) {
  Values& s = shared<Values>();
  const int t = static_cast<int>(threadIdx.x);
  s.x[t] = static_cast<float>(t);
  __syncthreads();  // orders the writes before the reads
  const float next = s.x[(t + 1) % kThreads];
  if constexpr (kBarrier) __syncthreads();  // orders the reads before the writes
  s.x[t] = next;
  __syncthreads();  // orders the writes before the reads
  out[t] = s.x[t];
}

__global__ void read_unwritten(float* out) {
  Values& s = shared<Values>();
  const int t = static_cast<int>(threadIdx.x);
  if (t != 5) s.x[t] = static_cast<float>(t);
  __syncthreads();  // orders the writes before the reads
  out[t] = s.x[t];
}

__global__ void beyond(float* out) {
  Values& s = shared<Values>();
  const int t = static_cast<int>(threadIdx.x);
  s.x[t + (out == nullptr ? 0 : 1)] = 1.0f;
  out[t] = static_cast<float>(t);
}

struct alignas(4) Halves {
  uint16_t x[2 * kThreads + 1];
};

// Two at once, which begin at an odd one.
__global__ void misaligned_shared(float* out) {
  Halves& s = shared<Halves>();
  const int t = static_cast<int>(threadIdx.x);
  *reinterpret_cast<uint32_t*>(s.x + 2 * t + 1) = 0;
  out[t] = static_cast<float>(t);
}

__global__ void return_before_barrier(float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();  // never complete
  out[threadIdx.x] = 0.0f;
}

__global__ void barrier_in_branch(float* out) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();  // never complete: half of the block waits at the other
    out[threadIdx.x] = 0.0f;
  } else {
    __syncthreads();
    out[threadIdx.x] = 1.0f;
  }
}

// Half of the block never comes to any barrier: it waits for its warp, which waits at the barrier.
__global__ void barrier_against_warp(float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 0.0f;
}

__global__ void predicates(float* out) {
  const int t = static_cast<int>(threadIdx.x);
  const int sum = __syncthreads_count(t % 3 == 0);
  const int any = __syncthreads_or(t == 50);
  const int all = __syncthreads_and(t != 50);
  out[t] = sum == kThreads / 3 && any && !all ? static_cast<float>((t + 1) % kThreads) : -1.0f;
}

struct Counts {
  int n[4];
};

// Counts threads by number mod 4; unless kAtomic, with updates that get lost.
template <bool kAtomic>
__global__ void histogram(float* out) {
  Counts& s = shared<Counts>();
  const int t = static_cast<int>(threadIdx.x);
  if (t < 4) s.n[t] = 0;
  __syncthreads();  // orders the zeros before the counting
  if constexpr (kAtomic) {
    atomicAdd(&s.n[t % 4], 1);
  } else {
    const int n = s.n[t % 4];
    __nanosleep(1);  // hardware interleaves here; the emulator only where it is told
    s.n[t % 4] = n + 1;
  }
  __syncthreads();  // orders the counts before their reads
  out[t] = s.n[t % 4] == kThreads / 4 ? static_cast<float>((t + 1) % kThreads) : -1.0f;
}

__global__ void large(float* out) {
  float* s = dynamic_shared<float>();
  const int t = static_cast<int>(threadIdx.x);
  const int last = 100 * 1024 / 4 - kThreads;
  s[last + t] = static_cast<float>(t);
  __syncthreads();  // orders the writes before the reads
  out[t] = s[last + (t + 1) % kThreads];
}

bool right(void (*kernel)(float*), unsigned smem = 0) {
  std::vector<float> out(kThreads, -1.0f);
  launch(kernel, {.name = "case", .block = kThreads, .smem = smem}, out.data());
  for (int t = 0; t < kThreads; ++t) {
    if (!(out[t] == static_cast<float>((t + 1) % kThreads))) return false;
  }
  return true;
}

// What another thread does that has asked for its shared memory before a smaller launch came.
bool limit_is_kept() {
  constexpr unsigned kBytes = 100 * 1024;
  if (!right(large, kBytes) || !right(rotate<true>, kBytes) || !right(rotate<true>, 60 * 1024)) {
    return false;
  }
  std::vector<float> out(kThreads);
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  return cudaLaunchKernelEx(&config, rotate<true>, out.data()) == cudaSuccess;
}

bool after_a_fault() {
  try {
    right(return_before_barrier);
    return false;
  } catch (const std::runtime_error&) {
    return right(exchange<true>);
  }
}

}  // namespace

std::vector<Case> block_cases() {
  return {
      {"exchange", [] { return right(exchange<true>); }},
      {"exchange_without_barrier", [] { return right(exchange<false>); }},
      {"rotate", [] { return right(rotate<true>); }},
      {"rotate_without_barrier", [] { return right(rotate<false>); }},
      {"read_unwritten", [] { return right(read_unwritten); }},
      {"beyond", [] { return right(beyond); }},
      {"misaligned_shared", [] { return right(misaligned_shared); }},
      {"return_before_barrier", [] { return right(return_before_barrier); }},
      {"barrier_in_branch", [] { return right(barrier_in_branch); }},
      {"barrier_against_warp", [] { return right(barrier_against_warp); }},
      {"predicates", [] { return right(predicates); }},
      {"histogram", [] { return right(histogram<true>); }},
      {"histogram_without_atomics", [] { return right(histogram<false>); }},
      {"large_dynamic", [] { return right(large, 100 * 1024); }},
      {"too_large_dynamic", [] { return right(large, 228 * 1024); }},
      {"limit_is_kept", limit_is_kept},
      {"after_a_fault", after_a_fault},
  };
}

}  // namespace seqkern::emulator
