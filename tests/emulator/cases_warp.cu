// Operations of a warp, and block.cuh's reductions.
#include "cases.h"
#include "cuda/block.cuh"

namespace seqkern::emulator {
namespace {

using cuda::kAllLanes;
using cuda::launch;
using cuda::shared;

constexpr int kThreads = 64;

// Each returns whether this lane saw what it should.

__device__ bool shuffles(int t) {
  const int lane = t % 32;
  const int warp = t - lane;
  return __shfl_sync(kAllLanes, t, 3) == warp + 3 &&
         __shfl_sync(kAllLanes, t, 1, 8) == warp + lane / 8 * 8 + 1 &&
         __shfl_xor_sync(kAllLanes, t, 5) == warp + (lane ^ 5) &&
         __shfl_down_sync(kAllLanes, t, 4) == (lane + 4 < 32 ? t + 4 : t) &&
         __shfl_up_sync(kAllLanes, t, 2) == (lane >= 2 ? t - 2 : t) &&
         __shfl_down_sync(kAllLanes, t + 0.5, 1) == (lane < 31 ? t + 1.5 : t + 0.5);
}

__device__ bool votes(int t) {
  const int lane = t % 32;
  return __ballot_sync(kAllLanes, lane % 2) == 0xaaaaaaaau && __any_sync(kAllLanes, lane == 9) &&
         !__any_sync(kAllLanes, lane == 40) && __all_sync(kAllLanes, lane < 32) &&
         !__all_sync(kAllLanes, lane != 9);
}

__device__ bool reductions(int t) {
  const int lane = t % 32;
  return __reduce_add_sync(kAllLanes, lane) == 31 * 16 &&
         __reduce_max_sync(kAllLanes, -lane) == 0 && __reduce_min_sync(kAllLanes, -lane) == -31 &&
         __reduce_or_sync(kAllLanes, 1u << lane) == 0xffffffffu;
}

// The two halves of the warp each on their own, at the same time and at different lines.
__device__ bool halves(int t) {
  const int lane = t % 32;
  if (lane < 16) return __shfl_xor_sync(0x0000ffffu, t, 1) == (t ^ 1);
  return __shfl_xor_sync(0xffff0000u, t, 2) == (t ^ 2);
}

template <bool kSync>
__device__ bool through_memory(int t) {
  struct Values {
    int x[kThreads];
  };
  Values& s = shared<Values>();
  s.x[t] = t;
  if constexpr (kSync) __syncwarp();  // orders the writes before the reads of the same warp
  return s.x[t ^ 1] == (t ^ 1);
}

// __syncwarp orders a warp, not the block.
__device__ bool syncwarp_for_block(int t) {
  struct Values {
    int x[kThreads];
  };
  Values& s = shared<Values>();
  s.x[t] = t;
  __syncwarp();
  return s.x[(t + 32) % kThreads] == (t + 32) % kThreads;
}

__device__ bool shuffle_in_branch(int t) {
  if (t % 32 < 16) return __shfl_xor_sync(kAllLanes, t, 1) == (t ^ 1);
  return true;
}

__device__ bool lanes_disagree(int t) {
  if (t % 32 < 16) return __shfl_xor_sync(kAllLanes, t, 1) == (t ^ 1);
  return __any_sync(kAllLanes, 1);
}

__device__ bool lane_outside_mask(int t) { return __shfl_sync(0x0000ffffu, t, 0) >= 0; }

__device__ bool block_reduce(int t) {
  const cuda::BlockGroup group;
  const auto add = [](float a, float b) { return a + b; };
  const float first = group.reduce(static_cast<float>(t), 0.0f, add);
  const float second = group.reduce(static_cast<float>(t * t), 0.0f, add);
  return first == kThreads * (kThreads - 1) / 2 &&
         second == (kThreads - 1) * kThreads * (2 * kThreads - 1) / 6;
}

// Rounds differently in each order: all lanes must have the same bits, under every seed.
__device__ bool same_bits(int t) {
  const cuda::WarpGroup group;
  const float sum = group.reduce(1.0f / static_cast<float>(t + 1), 0.0f,
                                 [](float a, float b) { return a + 3 * b; });
  return __reduce_max_sync(kAllLanes, __float_as_uint(sum)) ==
         __reduce_min_sync(kAllLanes, __float_as_uint(sum));
}

template <bool (*kCheck)(int)>
__global__ void kernel(int* out) {
  out[threadIdx.x] = kCheck(static_cast<int>(threadIdx.x));
}

template <bool (*kCheck)(int)>
bool right() {
  std::vector<int> out(kThreads, 0);
  launch(kernel<kCheck>, {.name = "case", .block = kThreads}, out.data());
  for (const int ok : out) {
    if (!ok) return false;
  }
  return true;
}

}  // namespace

std::vector<Case> warp_cases() {
  return {
      {"shuffles", right<shuffles>},
      {"votes", right<votes>},
      {"reductions", right<reductions>},
      {"halves", right<halves>},
      {"through_memory", right<through_memory<true>>},
      {"through_memory_without_syncwarp", right<through_memory<false>>},
      {"syncwarp_for_block", right<syncwarp_for_block>},
      {"shuffle_in_branch", right<shuffle_in_branch>},
      {"lanes_disagree", right<lanes_disagree>},
      {"lane_outside_mask", right<lane_outside_mask>},
      {"block_reduce", right<block_reduce>},
      {"same_bits", right<same_bits>},
  };
}

}  // namespace seqkern::emulator
