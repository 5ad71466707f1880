// Sums over a row of scores by the threads of one block: what the sampling kernels share, and the
// row of common/sampling.h that a block takes alone.
#pragma once

#include "common/sampling.h"
#include "cuda/block.cuh"
#include "cuda/vec.cuh"

namespace seqkern::cuda {

// ---------------------------------------------------------------- a warp's sums

struct Sum {
  unsigned long long x;
};
__device__ __forceinline__ Sum shuffle_down(Sum s, int delta) {
  return {__shfl_down_sync(kAllLanes, s.x, delta)};
}
__device__ __forceinline__ Sum broadcast(Sum s) { return {__shfl_sync(kAllLanes, s.x, 0)}; }

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
  return warp_reduce(Sum{x}, [](Sum a, Sum b) { return Sum{a.x + b.x}; }).x;
}

// The lane with which a running sum first exceeds `target`, and what of target is left there; -1 if
// the warp's whole sum does not, which is then taken off target.
struct Found {
  int lane;
  unsigned long long target;
};
__device__ __forceinline__ Found find_lane(unsigned long long x, unsigned long long target) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned long long running = x;
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const unsigned long long below = __shfl_up_sync(kAllLanes, running, delta);
    if (lane >= delta) running += below;
  }
  const unsigned exceeds = __ballot_sync(kAllLanes, running > target);
  const int found = exceeds ? __ffs(static_cast<int>(exceeds)) - 1 : kWarp - 1;
  const unsigned long long before = __shfl_sync(kAllLanes, exceeds ? running - x : running, found);
  return {exceeds ? found : -1, target - before};
}

// ---------------------------------------------------------------- sums in shared memory

// 64 bits in two halves: shared memory adds 32 bits in one instruction, but 64 only in a loop that
// repeats until no other thread came between.
struct Bin {
  unsigned low, high;

  __device__ __forceinline__ unsigned long long sum() const {
    return static_cast<unsigned long long>(high) << 32 | low;
  }
};

// Whatever the order of the additions, the low half wraps around as often as ones are carried.
__device__ __forceinline__ void add_carry(Bin& bin, unsigned long long x, unsigned before) {
  const unsigned low = static_cast<unsigned>(x);
  const unsigned high = static_cast<unsigned>(x >> 32) + (before + low < low ? 1 : 0);
  if (high > 0) atomicAdd(&bin.high, high);
}
__device__ __forceinline__ void add_to(Bin& bin, unsigned long long x) {
  add_carry(bin, x, atomicAdd(&bin.low, static_cast<unsigned>(x)));
}

// Several additions, which wait for their results together. Those of 0 go to a bin of the lane's
// own, where they change nothing: one for all would be waited for, and a branch takes longer.
template <int n>
__device__ __forceinline__ void add_to(Bin* bins, const int (&at)[n], const uint64_t (&x)[n]) {
  const int own = static_cast<int>(threadIdx.x) % kWarp;
  unsigned before[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    before[i] = atomicAdd(&bins[x[i] > 0 ? at[i] : own].low, static_cast<unsigned>(x[i]));
  }
#pragma unroll
  for (int i = 0; i < n; ++i) add_carry(bins[at[i]], x[i], before[i]);
}

// ---------------------------------------------------------------- a row

constexpr int kChunks =
    256;  // parts of a row whose sums are kept, so that a search reads one of them
constexpr int kPerLane = kChunks / kWarp;

struct BlockRowShared {
  Bin histogram[kRadixBins];
  unsigned long long sums[kChunks];
};

// Every thread of the block calls each member, and gets the same answer.
template <class T>
class BlockRow {
 public:
  __device__ BlockRow(const T* x, const int32_t* counts, const Penalties& penalties, int V)
      : x_(x),
        counts_(counts),
        penalties_(penalties),
        V_(V),
        chunk_(ceil_div(ceil_div(V, kChunks), kWarp) * kWarp),
        shared_(shared<BlockRowShared>()) {}

  __device__ __forceinline__ float score(int64_t v) const {
    return score_of(static_cast<float>(load1(x_ + v)), counts_ ? counts_[v] : 0, penalties_);
  }

  __device__ __forceinline__ float max() const {
    float largest = -__builtin_inff();
    for (int v = group_.rank(); v < V_; v += group_.size()) largest = larger(largest, score(v));
    return group_.reduce(largest, -__builtin_inff(), [](float a, float b) { return larger(a, b); });
  }

  __device__ uint64_t total(const Measure& measure) {
    // Orders the reads of earlier sums before the writes of these.
    __syncthreads();
    for (int c = group_.rank() / kWarp; c < kChunks; c += group_.size() / kWarp) {
      const int first = c * chunk_;
      const int end = first + chunk_ < V_ ? first + chunk_ : V_;
      unsigned long long sum = 0;
      for (int v = first + lane(); v < end; v += kWarp) sum += measure.of(score(v), v);
      sum = warp_sum(sum);
      if (lane() == 0) shared_.sums[c] = sum;
    }
    // Orders the warps' sums before every thread's reads, here and in locate().
    __syncthreads();
    return warp_sum(sum_of_lane());
  }

  // Each warp searches for itself: no barrier to hand the result out.
  __device__ int64_t locate(const Measure& measure, uint64_t target) const {
    Found found = find_lane(sum_of_lane(), target);
    int c = found.lane * kPerLane;
    for (; shared_.sums[c] <= found.target; ++c) found.target -= shared_.sums[c];
    for (int first = c * chunk_;; first += kWarp) {
      const int v = first + lane();
      found = find_lane(v < V_ ? measure.of(score(v), v) : 0, found.target);
      if (found.lane >= 0) return first + found.lane;
    }
  }

  template <class Need>
  __device__ Reached reach(const Measure& measure, Need need) const {
    Reached reached{.key = 0, .rest = 0};
    for (int l = 0; l < kRadixLevels; ++l) {
      const RadixLevel level(l);
      // Orders the searches of the earlier level before these zeros.
      __syncthreads();
      for (int bin = group_.rank(); bin < level.bins; bin += group_.size())
        shared_.histogram[bin] = {0, 0};
      // Orders the zeros before the additions.
      __syncthreads();
      for (int v = group_.rank(); v < V_; v += group_.size()) {
        const float y = score(v);
        const uint32_t key = key_of(y);
        if ((key & level.settled) != reached.key) continue;
        const unsigned long long amount = measure.of(y, v);
        if (amount > 0) add_to(shared_.histogram[level.bin_of(key)], amount);
      }
      // Orders the additions before the search.
      __syncthreads();
      // From the highest bin down, a run of bins per lane; each lane begins elsewhere in its run,
      // or all would read from one bank.
      const int run = level.bins / kWarp;
      const int highest = level.bins - 1 - lane() * run;
      unsigned long long sum = 0;
      for (int i = 0; i < run; ++i) sum += shared_.histogram[highest - (i + lane()) % run].sum();
      if (l == 0) reached.rest = need(warp_sum(sum));
      const Found found = find_lane(sum, reached.rest - 1);
      int bin = level.bins - 1 - found.lane * run;
      unsigned long long target = found.target;
      for (; shared_.histogram[bin].sum() <= target; --bin) target -= shared_.histogram[bin].sum();
      reached.key |= static_cast<uint32_t>(bin) << level.shift;
      reached.rest = target + 1;
    }
    return reached;
  }

 private:
  __device__ __forceinline__ int lane() const { return group_.rank() % kWarp; }

  // NaN if either is.
  __device__ static __forceinline__ float larger(float a, float b) {
    return a > b || a != a ? a : b;
  }

  __device__ __forceinline__ unsigned long long sum_of_lane() const {
    unsigned long long sum = 0;
    for (int i = 0; i < kPerLane; ++i) sum += shared_.sums[lane() * kPerLane + i];
    return sum;
  }

  const T* x_;             // [V]
  const int32_t* counts_;  // [V] or null
  const Penalties& penalties_;
  int V_;
  int chunk_;  // tokens per sum
  BlockGroup group_;
  BlockRowShared& shared_;
};

}  // namespace seqkern::cuda
