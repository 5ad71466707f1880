// Searches of a block: for the bin of a histogram in which a sum is reached, and among a few
// entries.
#pragma once

#include "cuda/sample_row.cuh"

namespace seqkern::cuda {

// ---------------------------------------------------------------- reductions

struct KeyRange {
  uint32_t low, high;
};
__device__ __forceinline__ KeyRange shuffle_down(KeyRange r, int delta) {
  return {__shfl_down_sync(kAllLanes, r.low, delta), __shfl_down_sync(kAllLanes, r.high, delta)};
}
__device__ __forceinline__ KeyRange broadcast(KeyRange r) {
  return {__shfl_sync(kAllLanes, r.low, 0), __shfl_sync(kAllLanes, r.high, 0)};
}
__device__ __forceinline__ KeyRange both(KeyRange a, KeyRange b) {
  return {a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}
inline constexpr KeyRange kNoKeys = {0xffffffffu, 0};

__device__ inline unsigned long long block_sum(unsigned long long x) {
  return BlockGroup().reduce(Sum{x}, Sum{0}, [](Sum a, Sum b) { return Sum{a.x + b.x}; }).x;
}

// ---------------------------------------------------------------- search in bins

struct FoundBin {
  int bin;
  unsigned long long rest;  // needed of it, at least 1
};

// The first bin with which the sum reaches need(sum of all). Every warp searches for itself.
template <int kBins, class Need>
__device__ FoundBin find_bin(const Bin* bins, Need need) {
  constexpr int kRun = kBins / kWarp, kEach = kRun / kWarp;
  static_assert(kEach >= 1);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned long long sum = 0;
  // Each lane begins elsewhere in its run, or all would read from one bank.
  for (int i = 0; i < kRun; ++i) sum += bins[lane * kRun + (i + lane) % kRun].sum();
  Found found = find_lane(sum, need(warp_sum(sum)) - 1);
  const int first = found.lane * kRun;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += bins[first + lane * kEach + i].sum();
  found = find_lane(sum, found.target);
  int bin = first + found.lane * kEach;
  for (; bins[bin].sum() <= found.target; ++bin) found.target -= bins[bin].sum();
  return {bin, found.target + 1};
}

template <int kBins>
struct BinsShared {
  Bin bins[kBins];
};

// A histogram from memory, where find_bin reads it.
template <int kBins, class X>
__device__ const Bin* bins_in_shared(const X* histogram) {
  BinsShared<kBins>& shared = cuda::shared<BinsShared<kBins>>();
  // Orders the searches of an earlier histogram before these writes.
  __syncthreads();
  for (int bin = BlockGroup().rank(); bin < kBins; bin += BlockGroup().size()) {
    const uint64_t sum = histogram[bin];
    shared.bins[bin] = {static_cast<unsigned>(sum), static_cast<unsigned>(sum >> 32)};
  }
  // Orders the copy before the searches.
  __syncthreads();
  return shared.bins;
}

// at(bin) over bins [begin, end). Every warp adds them up for itself.
template <class At>
__device__ uint64_t sum_of_bins(int begin, int end, At at) {
  unsigned long long sum = 0;
  for (int bin = begin + static_cast<int>(threadIdx.x) % kWarp; bin < end; bin += kWarp)
    sum += at(bin);
  return warp_sum(sum);
}

inline constexpr int kNarrowBits = 10;
inline constexpr int kNarrowBins = 1 << kNarrowBits;

struct NarrowShared {
  Bin bins[kNarrowBins];
};

// Where a search ended, and what it added up on the way.
struct Narrowed {
  Reached reached;
  unsigned long long equal;  // amounts of reached.key
  unsigned long long sum;    // of all amounts
};

// Entries up to which each is compared with all others: below, the levels of a histogram take
// longer.
inline constexpr int kRanked = 128;
inline constexpr int kRankLanes = 4;  // that share an entry's comparisons

struct RankedShared {
  uint32_t keys[kRanked];
  unsigned long long amounts[kRanked];
  unsigned long long rest, equal, sum;
  uint32_t key;
};

// merge over the lanes that share an entry.
template <class X, class Merge>
__device__ __forceinline__ X over_rank_lanes(X x, Merge merge) {
#pragma unroll
  for (int delta = 1; delta < kRankLanes; delta *= 2)
    x = merge(x, __shfl_xor_sync(kAllLanes, x, delta));
  return x;
}

// narrow() of few entries, by a block of kRankLanes threads for each of kRanked.
template <class Entry, class Need>
__device__ Narrowed narrow_ranked(int n, Entry entry, Need need) {
  RankedShared& shared = cuda::shared<RankedShared>();
  const int rank = BlockGroup().rank();
  // Orders the reads of an earlier search before these writes.
  __syncthreads();
  if (rank < n) {
    uint32_t key = 0;
    unsigned long long amount = 0;
    if (!entry(rank, key, amount)) amount = 0;
    shared.keys[rank] = key;
    shared.amounts[rank] = amount;
  }
  // Orders the entries before every thread's reads.
  __syncthreads();
  // Whole warps take part. Lanes without an entry look at the last one, and change nothing.
  if (rank / kWarp * (kWarp / kRankLanes) < n) {
    const int mine = rank / kRankLanes;
    const uint32_t key = shared.keys[mine < n ? mine : n - 1];
    unsigned long long above = 0, equal = 0, sum = 0;
    int first = kRanked;  // of the key's entries that have an amount
    for (int i = rank % kRankLanes; i < n; i += kRankLanes) {
      const uint32_t other = shared.keys[i];
      const unsigned long long its = shared.amounts[i];
      sum += its;
      if (other > key) above += its;
      if (other == key) equal += its;
      if (other == key && its > 0 && i < first) first = i;
    }
    const auto add = [](unsigned long long a, unsigned long long b) { return a + b; };
    above = over_rank_lanes(above, add);
    equal = over_rank_lanes(equal, add);
    sum = over_rank_lanes(sum, add);
    first = over_rank_lanes(first, [](int a, int b) { return a < b ? a : b; });
    const unsigned long long needed = need(sum);
    if (mine == first && rank % kRankLanes == 0 && above < needed && needed <= above + equal) {
      shared.key = key;
      shared.rest = needed - above;
      shared.equal = equal;
      shared.sum = sum;
    }
  }
  // Orders what was found before every thread reads it.
  __syncthreads();
  return {{.key = shared.key, .rest = shared.rest}, shared.equal, shared.sum};
}

// Of entries [0, n), each with a key and an amount: the key with which the sum over falling keys
// reaches need(sum of all). entry(i, key, amount) says whether there is entry i. Every thread of
// the block calls this, and gets the same answer.
template <class Entry, class Need>
__device__ Narrowed narrow(int n, Entry entry, Need need) {
  if (n <= kRanked) return narrow_ranked(n, entry, need);
  const BlockGroup group;
  NarrowShared& shared = cuda::shared<NarrowShared>();
  KeyRange range = kNoKeys;
  unsigned long long sum = 0;
  for (int i = group.rank(); i < n; i += group.size()) {
    uint32_t key;
    unsigned long long amount;
    if (!entry(i, key, amount) || amount == 0) continue;
    range = both(range, {key, key});
    sum += amount;
  }
  range = group.reduce(range, kNoKeys, both);
  sum = block_sum(sum);
  unsigned long long rest = need(sum);
  unsigned long long equal = sum;
  while (range.low < range.high) {
    const int bits = 32 - __clz(static_cast<int>(range.high - range.low));
    const int shift = bits > kNarrowBits ? bits - kNarrowBits : 0;
    // Orders the searches of an earlier level before these zeros.
    __syncthreads();
    for (int bin = group.rank(); bin < kNarrowBins; bin += group.size()) shared.bins[bin] = {0, 0};
    // Orders the zeros before the additions.
    __syncthreads();
    for (int i = group.rank(); i < n; i += group.size()) {
      uint32_t key;
      unsigned long long amount;
      if (!entry(i, key, amount) || amount == 0) continue;
      if (key < range.low || key > range.high) continue;
      // The first bin has the highest keys.
      add_to(shared.bins[kNarrowBins - 1 - ((key - range.low) >> shift)], amount);
    }
    // Orders the additions before the search.
    __syncthreads();
    const FoundBin found =
        find_bin<kNarrowBins>(shared.bins, [=](unsigned long long) { return rest; });
    rest = found.rest;
    equal = shared.bins[found.bin].sum();  // of the key's alone once the range has no other
    range.low += static_cast<uint32_t>(kNarrowBins - 1 - found.bin) << shift;
    const uint32_t width = (1u << shift) - 1;
    if (range.high - range.low > width) range.high = range.low + width;
  }
  return {{.key = range.low, .rest = rest}, equal, sum};
}

// The last id of the listed tokens of the key that was reached, each of amount `each`, that it
// takes to reach the rest, from the lowest id on; INT64_MAX where it takes all, as mostly.
__device__ inline int64_t last_of_ties(const uint2* list, int n, const Narrowed& at,
                                       uint64_t each) {
  if (at.reached.rest + each > at.equal) return INT64_MAX;
  const uint32_t key = at.reached.key;
  const auto entry = [=](int i, uint32_t& reversed, unsigned long long& amount) {
    const uint2 token = list[i];
    reversed = ~token.y;
    amount = 1;
    return token.x == key;
  };
  const Narrowed last =
      narrow(n, entry, [&](unsigned long long) { return ceil_div(at.reached.rest, each); });
  return static_cast<int64_t>(~last.reached.key);
}

}  // namespace seqkern::cuda
