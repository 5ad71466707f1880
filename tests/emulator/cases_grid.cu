// Launches, and grids whose blocks are alive together.
#include <cooperative_groups.h>

#include <cstdio>

#include "cases.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace seqkern::emulator {
namespace {

using cuda::launch;

constexpr unsigned kBlocks = 12;
constexpr unsigned kThreads = 40;

struct Numbers {
  float x[kThreads];
};

// Each block keeps numbers in its own shared memory over several rounds, in each of which it reads
// what another block has just published.
template <bool kSync>
__global__ void rounds(float* published, float* out) {
  Numbers& own = cuda::shared<Numbers>();
  const unsigned t = threadIdx.x;
  own.x[t] = static_cast<float>(blockIdx.x);
  for (int round = 0; round < 3; ++round) {
    published[blockIdx.x * kThreads + t] = own.x[t];
    // Orders every block's writes before any block's reads.
    if constexpr (kSync) cooperative_groups::this_grid().sync();
    const float next = published[(blockIdx.x + 1) % gridDim.x * kThreads + t];
    if constexpr (kSync)
      cooperative_groups::this_grid().sync();  // and the reads before the next writes
    own.x[t] += next;
  }
  out[blockIdx.x * kThreads + t] = own.x[t];
}

bool right(void (*kernel)(float*, float*), bool cooperative, unsigned blocks = kBlocks) {
  std::vector<float> published(blocks * kThreads, -1.0f), out(blocks * kThreads, -1.0f);
  launch(kernel, {.name = "case", .grid = blocks, .block = kThreads, .cooperative = cooperative},
         published.data(), out.data());
  std::vector<float> want(blocks);
  for (unsigned b = 0; b < blocks; ++b) want[b] = static_cast<float>(b);
  for (int round = 0; round < 3; ++round) {
    std::vector<float> next(blocks);
    for (unsigned b = 0; b < blocks; ++b) next[b] = want[b] + want[(b + 1) % blocks];
    want = next;
  }
  for (unsigned i = 0; i < out.size(); ++i) {
    if (out[i] != want[i / kThreads]) return false;
  }
  return true;
}

__global__ void take_ticket(int* next, int* order) {
  order[atomicAdd(next, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// Prints the order in which threads ran.
bool order() {
  int next = 0;
  std::vector<int> order(4 * 4, -1);
  launch(take_ticket, {.name = "case", .grid = 4, .block = 4}, &next, order.data());
  for (const int thread : order) std::printf("%d ", thread);
  return next == 16;
}

__global__ void index(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

bool indices(dim3 grid, dim3 block) {
  std::vector<int> out(grid.x * grid.y * grid.z * block.x * block.y * block.z, 0);
  launch(index, {.name = "case", .grid = grid, .block = block}, out.data());
  for (const int n : out) {
    if (n != 1) return false;
  }
  return true;
}

// A flag that another block sets: terminates only where both are alive.
__global__ void wait_for_flag(int* flag, int* out) {
  if (blockIdx.x == 0) atomicExch(flag, 1);
  while (atomicAdd(flag, 0) == 0) __nanosleep(20);
  out[blockIdx.x] = 1;
}

bool flag() {
  int flag = 0;
  std::vector<int> out(4, 0);
  launch(wait_for_flag, {.name = "case", .grid = 4, .cooperative = true}, &flag, out.data());
  return out == std::vector<int>{1, 1, 1, 1};
}

constexpr uint32_t kFlaggedRounds = 12;

// Rounds in which a block waits for the flag of the other, and no more: each publishes its sum in
// one of two buffers, which the other has read before it publishes the next.
template <bool kWait, unsigned kBuffers = 2>
__global__ void flagged_rounds(uint32_t* flags, float* published, float* out) {
  const unsigned t = threadIdx.x, next = (blockIdx.x + 1) % gridDim.x;
  float sum = static_cast<float>(blockIdx.x);
  for (uint32_t round = 0; round < kFlaggedRounds; ++round) {
    float* buffer = published + round % kBuffers * gridDim.x * kThreads;
    buffer[blockIdx.x * kThreads + t] = sum;
    // Orders the block's numbers before its flag.
    __syncthreads();
    if (t == 0) cuda::store_release(flags + blockIdx.x, round + 1);
    if constexpr (kWait) {
      while (cuda::load_acquire(flags + next) < round + 1) __nanosleep(20);
    }
    sum += buffer[next * kThreads + t];
  }
  out[blockIdx.x * kThreads + t] = sum;
}

// The same with copies that begin before the wait, or after it.
template <bool kAfter>
__global__ void copied_rounds(uint32_t* flags, float* published, float* out) {
  Numbers& copied = cuda::shared<Numbers>();
  const unsigned t = threadIdx.x, next = (blockIdx.x + 1) % gridDim.x;
  float sum = static_cast<float>(blockIdx.x);
  for (uint32_t round = 0; round < kFlaggedRounds; ++round) {
    float* buffer = published + round % 2 * gridDim.x * kThreads;
    buffer[blockIdx.x * kThreads + t] = sum;
    // Orders the block's numbers before its flag.
    __syncthreads();
    if (t == 0) cuda::store_release(flags + blockIdx.x, round + 1);
    const auto copy = [&] {
      cuda::cp_async<4>(copied.x + t, buffer + next * kThreads + t);
      cuda::cp_async_commit();
    };
    if constexpr (!kAfter) copy();
    while (cuda::load_acquire(flags + next) < round + 1) __nanosleep(20);
    if constexpr (kAfter) copy();
    cuda::cp_async_wait<0>();
    sum += copied.x[t];
  }
  out[blockIdx.x * kThreads + t] = sum;
}

// Of two blocks each waits for the other. In a ring of more, the next may be as many rounds ahead
// as there are others, and overwrite what a slow block has not read yet.
bool flagged(void (*kernel)(uint32_t*, float*, float*), unsigned blocks = 2) {
  std::vector<float> want(blocks);
  for (unsigned b = 0; b < blocks; ++b) want[b] = static_cast<float>(b);
  for (uint32_t round = 0; round < kFlaggedRounds; ++round) {
    const std::vector<float> before = want;
    for (unsigned b = 0; b < blocks; ++b) want[b] += before[(b + 1) % blocks];
  }
  constexpr int kLaunches = 10, kMostBuffers = 4;
  for (int i = 0; i < kLaunches; ++i) {
    std::vector<uint32_t> flags(blocks, 0);
    std::vector<float> published(kMostBuffers * blocks * kThreads, -1.0f);
    std::vector<float> out(blocks * kThreads, -1.0f);
    launch(kernel, {.name = "case", .grid = blocks, .block = kThreads, .cooperative = true},
           flags.data(), published.data(), out.data());
    for (unsigned n = 0; n < out.size(); ++n) {
      if (out[n] != want[n / kThreads]) return false;
    }
  }
  return true;
}

// What the device says of itself, and what a cooperative launch may take of it.
bool fits(unsigned blocks_per_multiprocessor) {
  set_device({.multiprocessors = 3, .shared_bytes = 100 * 1024, .cooperative = true});
  const cuda::Device device = cuda::current_device();
  if (device.multiprocessors != 3 || device.shared_bytes != 100 * 1024 || !device.cooperative)
    return false;
  const unsigned blocks = 3 * blocks_per_multiprocessor;
  std::vector<int> out(blocks, 0);
  launch(index,
         {.name = "case", .grid = blocks, .block = 1, .smem = 40 * 1024, .cooperative = true},
         out.data());
  return out == std::vector<int>(blocks, 1);
}

bool not_cooperative() {
  set_device({.multiprocessors = 3, .shared_bytes = 100 * 1024, .cooperative = false});
  return right(rounds<true>, true);
}

bool not_built_for() {
  set_device({.known = false});
  return right(rounds<true>, true);
}

}  // namespace

std::vector<Case> grid_cases() {
  return {
      {"grid_sync", [] { return right(rounds<true>, true); }},
      {"without_grid_sync", [] { return right(rounds<false>, true); }},
      {"grid_sync_not_cooperative", [] { return right(rounds<true>, false); }},
      {"cooperative_too_large", [] { return right(rounds<true>, true, 100000); }},
      {"order", order},
      {"indices", [] { return indices({2, 3, 4}, {5, 2, 3}); }},
      {"block_too_large", [] { return indices(1, 2048); }},
      {"flag", flag},
      {"flagged_rounds", [] { return flagged(flagged_rounds<true>); }},
      {"flagged_rounds_without_wait", [] { return flagged(flagged_rounds<false>); }},
      {"flagged_rounds_of_six", [] { return flagged(flagged_rounds<true, 4>, 6); }},
      {"copied_rounds", [] { return flagged(copied_rounds<true>); }},
      {"copied_rounds_too_early", [] { return flagged(copied_rounds<false>); }},
      {"device", [] { return fits(2); }},
      {"cooperative_beyond_shared_memory", [] { return fits(3); }},
      {"cooperative_not_supported", not_cooperative},
      {"not_built_for", not_built_for},
  };
}

}  // namespace seqkern::emulator
