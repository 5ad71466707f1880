// Global memory: what a kernel may touch, and what orders the accesses of several threads to it.
#include <cooperative_groups.h>

#include "cases.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vec.cuh"

namespace seqkern::emulator {
namespace {

using cuda::launch;

constexpr unsigned kBlocks = 4, kThreads = 64;
constexpr unsigned kNumbers = kBlocks * kThreads;

// ---------------------------------------------------------------- bounds and alignment

struct Touch {
  int read = 0, written = 0;  // elements past the thread's own
  bool writes_input = false;
};

__global__ void add_one(const float* in, float* out, Touch touch) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  float* to = touch.writes_input ? const_cast<float*>(in) : out;
  to[static_cast<int>(i) + touch.written] = in[static_cast<int>(i) + touch.read] + 1;
}

// Between the arrays lie elements that belong to neither.
bool touches(Touch touch) {
  constexpr unsigned kGap = 8;
  std::vector<float> all(2 * kNumbers + 3 * kGap, 1.0f);
  float* in = all.data() + kGap;
  float* out = in + kNumbers + kGap;
  begin_op();
  allow(in, kNumbers * sizeof(float), false);
  allow(out, kNumbers * sizeof(float), true);
  struct End {
    ~End() { end_op(); }
  } end;
  launch(add_one, {.name = "case", .grid = kBlocks, .block = kThreads}, in, out, touch);
  for (unsigned i = 0; i < kNumbers; ++i) {
    if (out[i] != 2.0f) return false;
  }
  return true;
}

__global__ void add_pairs(const uint16_t* in, uint32_t* out) {
  out[threadIdx.x] = *reinterpret_cast<const uint32_t*>(in + 2 * threadIdx.x);
}

bool pairs(unsigned offset) {
  alignas(4) uint16_t in[2 * kThreads + 2] = {};
  std::vector<uint32_t> out(kThreads, 1);
  launch(add_pairs, {.name = "case", .block = kThreads}, in + offset, out.data());
  return out == std::vector<uint32_t>(kThreads, 0);
}

// ---------------------------------------------------------------- within a block

enum class Between { kNothing, kBarrier, kSyncwarp };

// Each thread leaves a number where another of its block, or of its warp, reads it.
template <Between kBetween, unsigned kDistance>
__global__ void hand_on(int* handed, int* out) {
  const unsigned block = blockIdx.x * kThreads, t = threadIdx.x;
  handed[block + t] = static_cast<int>(t);
  if constexpr (kBetween == Between::kBarrier)
    __syncthreads();                                           // orders the writes before the reads
  if constexpr (kBetween == Between::kSyncwarp) __syncwarp();  // the same, in a warp
  out[block + t] = handed[block + (t ^ kDistance)];
}

bool hands_on(void (*kernel)(int*, int*)) {
  std::vector<int> handed(kNumbers, -1), out(kNumbers, -1);
  launch(kernel, {.name = "case", .grid = kBlocks, .block = kThreads}, handed.data(), out.data());
  for (unsigned i = 0; i < kNumbers; ++i) {
    if (handed[i] != static_cast<int>(i % kThreads)) return false;
  }
  return true;
}

// ---------------------------------------------------------------- between blocks

__global__ void all_write(int* where) { *where = 7; }

bool same_place() {
  int where = 0;
  launch(all_write, {.name = "case", .grid = kBlocks}, &where);
  return where == 7;
}

// The last block to count itself adds up what all threads of all blocks left.
enum class Fences { kBoth, kNoneBefore, kNoneAfter, kPlainReset };

template <Fences kFences>
__global__ void last_adds(int* counter, int* left, int* sum) {
  int& last = cuda::shared<int>();
  left[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (kFences != Fences::kNoneBefore) __threadfence();
  __syncthreads();  // orders all threads' numbers before the count
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    if (last && kFences == Fences::kPlainReset) *counter = 0;
  }
  __syncthreads();  // orders the count before it is read
  if (!last) return;
  if constexpr (kFences != Fences::kNoneAfter) __threadfence();
  if (threadIdx.x != 1) return;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) *sum += left[i];
}

bool last(void (*kernel)(int*, int*, int*)) {
  int counter = 0, sum = 0;
  std::vector<int> left(kNumbers, 1000);
  launch(kernel, {.name = "case", .grid = kBlocks, .block = kThreads}, &counter, left.data(), &sum);
  return sum == static_cast<int>(kBlocks * kThreads * (kThreads - 1) / 2);
}

// Block 0 publishes numbers under a flag, which the others' first lanes wait for.
enum class Flag { kRight, kNoBarrier, kNoSyncwarp, kNoAcquire, kWrittenAgain };

template <Flag kFlag>
__global__ void publish(uint32_t* flag, int* numbers, int* out) {
  const unsigned t = threadIdx.x;
  if (blockIdx.x == 0) {
    numbers[t] = static_cast<int>(t);
    if constexpr (kFlag != Flag::kNoBarrier) __syncthreads();  // orders the numbers before the flag
    if (t == 0) cuda::store_release(flag, 1);
    if constexpr (kFlag == Flag::kWrittenAgain) numbers[t] = static_cast<int>(t);
    return;
  }
  if (t % kWarpSize == 0) {
    if constexpr (kFlag == Flag::kNoAcquire) {
      while (atomicAdd(flag, 0u) == 0) __nanosleep(20);
    } else {
      while (cuda::load_acquire(flag) == 0) __nanosleep(20);
    }
  }
  if constexpr (kFlag == Flag::kNoSyncwarp) {
    __shfl_sync(0xffffffffu, 0, 0);  // lanes wait, but nothing of memory is ordered
  } else {
    __syncwarp();  // hands what the first lane acquired on to the others
  }
  out[blockIdx.x * kThreads + t] = numbers[t];
}

bool published(void (*kernel)(uint32_t*, int*, int*)) {
  uint32_t flag = 0;
  std::vector<int> numbers(kThreads, -1), out(kNumbers, -1);
  launch(kernel, {.name = "case", .grid = kBlocks, .block = kThreads, .cooperative = true}, &flag,
         numbers.data(), out.data());
  for (unsigned i = kThreads; i < kNumbers; ++i) {
    if (out[i] != static_cast<int>(i % kThreads)) return false;
  }
  return true;
}

// What block 1 knows of block 0, block 2 knows by block 1's flag.
template <bool kAll>
__global__ void pass_on(uint32_t* flags, int* number, int* out) {
  const unsigned b = blockIdx.x;
  if (b == 0) *number = 5;
  if (b > 0 && (kAll || b > 1)) {
    while (cuda::load_acquire(flags + b - 1) == 0) __nanosleep(20);
  }
  cuda::store_release(flags + b, 1);
  if (b == gridDim.x - 1) *out = *number;
}

bool passed_on(void (*kernel)(uint32_t*, int*, int*)) {
  std::vector<uint32_t> flags(kBlocks, 0);
  int number = 0, out = 0;
  launch(kernel, {.name = "case", .grid = kBlocks, .cooperative = true}, flags.data(), &number,
         &out);
  return out == 5;
}

// Values that say themselves that they are new.
template <bool kRelaxed>
__global__ void values(uint16_t* numbers, int* out) {
  const unsigned t = threadIdx.x;
  if (blockIdx.x == 0) {
    if constexpr (kRelaxed) {
      cuda::store_relaxed(numbers + t, static_cast<uint16_t>(t + 1));
    } else {
      numbers[t] = static_cast<uint16_t>(t + 1);
    }
    return;
  }
  if (t >= kThreads / 8) return;
  const auto is_new = [](uint32_t two) { return (two & 0xffffu) != 0 && (two >> 16) != 0; };
  uint4 x;
  do {
    __nanosleep(20);
    x = cuda::load_relaxed(numbers + 8 * t);
  } while (!is_new(x.x) || !is_new(x.y) || !is_new(x.z) || !is_new(x.w));
  out[blockIdx.x * kThreads + t] = static_cast<int>(x.x & 0xffffu);
}

bool valued(void (*kernel)(uint16_t*, int*)) {
  struct alignas(16) {
    uint16_t x[kThreads] = {};
  } numbers;
  std::vector<int> out(kNumbers, -1);
  launch(kernel, {.name = "case", .grid = kBlocks, .block = kThreads, .cooperative = true},
         &numbers.x[0], out.data());
  for (unsigned i = 0; i < (kBlocks - 1) * kThreads / 8; ++i) {
    const unsigned b = 1 + i / (kThreads / 8), t = i % (kThreads / 8);
    if (out[b * kThreads + t] != static_cast<int>(8 * t + 1)) return false;
  }
  return true;
}

}  // namespace

std::vector<Case> global_cases() {
  return {
      {"touches", [] { return touches({}); }},
      {"reads_past_the_end", [] { return touches({.read = 1}); }},
      {"reads_before_the_begin", [] { return touches({.read = -1}); }},
      {"writes_past_the_end", [] { return touches({.written = 1}); }},
      {"writes_input", [] { return touches({.writes_input = true}); }},
      {"pairs", [] { return pairs(0); }},
      {"misaligned_pairs", [] { return pairs(1); }},
      {"hand_on", [] { return hands_on(hand_on<Between::kBarrier, 33>); }},
      {"hand_on_in_warp", [] { return hands_on(hand_on<Between::kSyncwarp, 1>); }},
      {"hand_on_without_barrier", [] { return hands_on(hand_on<Between::kNothing, 1>); }},
      {"hand_on_with_syncwarp", [] { return hands_on(hand_on<Between::kSyncwarp, 33>); }},
      {"same_place", same_place},
      {"last_adds", [] { return last(last_adds<Fences::kBoth>); }},
      {"last_adds_unfenced_before", [] { return last(last_adds<Fences::kNoneBefore>); }},
      {"last_adds_unfenced_after", [] { return last(last_adds<Fences::kNoneAfter>); }},
      {"last_adds_plain_reset", [] { return last(last_adds<Fences::kPlainReset>); }},
      {"publish", [] { return published(publish<Flag::kRight>); }},
      {"publish_without_barrier", [] { return published(publish<Flag::kNoBarrier>); }},
      {"publish_without_syncwarp", [] { return published(publish<Flag::kNoSyncwarp>); }},
      {"publish_without_acquire", [] { return published(publish<Flag::kNoAcquire>); }},
      {"publish_written_again", [] { return published(publish<Flag::kWrittenAgain>); }},
      {"pass_on", [] { return passed_on(pass_on<true>); }},
      {"pass_on_with_a_gap", [] { return passed_on(pass_on<false>); }},
      {"values", [] { return valued(values<true>); }},
      {"values_not_relaxed", [] { return valued(values<false>); }},
  };
}

}  // namespace seqkern::emulator
