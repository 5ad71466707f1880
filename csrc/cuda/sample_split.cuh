// Sampling from long rows, whose tokens many blocks share: how a row is split, and what its blocks
// leave each other in the workspace.
//
// A row is cut into runs of whole tiles; a tile is one 16-byte access of each lane of a warp. Runs
// have their largest score, by which later passes skip them, and the sum of what stays of their
// masses, by which a token is found.
#pragma once

#include "cuda/kernels.h"
#include "cuda/sample_search.cuh"

namespace seqkern::cuda {

inline constexpr unsigned kPassThreads = 256;
inline constexpr int kPassWarps = kPassThreads / kWarp;
inline constexpr int kPassBlocks = 3;   // on a multiprocessor: 80 registers a thread
inline constexpr int kShortRow = 4096;  // tokens up to which one block takes the row alone
inline constexpr int kMostRuns = 4096;
inline constexpr int kMostRows = 512;  // long ones at once: what bounds the workspace
inline constexpr int kDepths = 2048;   // bins of scores below the largest
inline constexpr int kListed = 4096;   // tokens that a row's list has room for

// Runs of a warp whose loads are in flight together; of masses, whose arithmetic the compiler would
// otherwise interleave beyond the registers, fewer.
template <class T>
inline constexpr int kUnroll = 4;
template <class T>
inline constexpr int kMassUnroll = kPack<T> > 4 ? 1 : 2;
inline constexpr int kListUnroll = 2;  // few of a warp's runs reach the bound of top-k

inline constexpr uint32_t kLowestKey = 0x007fffffu;  // of a score of -inf
// Scores below are taken for a mask's (-1e4, -1e9, the least of a type), which says nothing of how
// far the others lie apart.
inline constexpr float kMasked = -5000;

struct SamplePlan {
  int64_t first;  // row of the launch, and
  int64_t rows;   // how many
  int runs;       // of a row; 0: a block takes a row alone
  int run_tiles;  // of each run
  int blocks;     // of a row

  // Up to here the k-th largest of the runs' largest scores is a bound that few others reach.
  SEQKERN_HD int64_t most_listed() const { return runs / 2 < 1024 ? runs / 2 : 1024; }
};

// ---------------------------------------------------------------- workspace

struct alignas(16) RowState {
  unsigned listed;               // tokens that wanted to be; beyond kListed the list is of no use
  int64_t k;                     // of the list, that top-k leaves; 0: all
  uint64_t before;               // masses of higher scores than the list's
  uint64_t unlisted;             // masses that top-k leaves, beside the list's
  unsigned long long model_sum;  // masses of softmax(x), where its logarithm is asked for
};

struct RowSpace {
  RowState* state;
  unsigned long long* masses;    // [kDepths]
  unsigned* counts;              // [kDepths]
  uint2* list;                   // [kListed] of (key, token), in no order
  unsigned long long* run_sums;  // [runs]
  uint32_t* run_keys;            // [runs]
  uint32_t* model_keys;          // [runs] of x, where scores are others

  static constexpr int64_t kFixed = sizeof(RowState) + kDepths * 12 + kListed * sizeof(uint2);
  static_assert(kFixed % 16 == 0);
  SEQKERN_HD static int64_t bytes(const SamplePlan& plan) {
    return kFixed + int64_t{plan.runs} * 16;
  }
  __device__ RowSpace(const SamplePlan& plan, void* workspace, int64_t b) {
    char* base = static_cast<char*>(workspace) + (b - plan.first) * bytes(plan);
    state = reinterpret_cast<RowState*>(base);
    masses = reinterpret_cast<unsigned long long*>(base + sizeof(RowState));
    counts = reinterpret_cast<unsigned*>(masses + kDepths);
    list = reinterpret_cast<uint2*>(counts + kDepths);
    run_sums = reinterpret_cast<unsigned long long*>(list + kListed);
    run_keys = reinterpret_cast<uint32_t*>(run_sums + plan.runs);
    model_keys = run_keys + plan.runs;
  }
};

// ---------------------------------------------------------------- what a row asks for

enum class Way {
  kGreedy,     // the largest score
  kList,       // top-k of few: all that stay are listed, and everything else happens in the list
  kHistogram,  // top-p, top-k of many, or both: histograms tell where the last score is that stays
  kSums,       // nothing but min-p
};

struct Cuts {
  bool top_k, top_p;
};
__device__ inline Cuts cuts_of(const SampleArgs& args, int64_t b) {
  const int64_t k = args.top_k.at(b);
  return {.top_k = k > 0 && k < args.V, .top_p = args.top_p.at(b) < 1};
}

__device__ inline Way way_of(const SampleArgs& args, const SamplePlan& plan, int64_t b) {
  if (args.temperature.at(b) == 0) return Way::kGreedy;
  const Cuts cuts = cuts_of(args, b);
  if (cuts.top_k && args.top_k.at(b) <= plan.most_listed()) return Way::kList;
  return cuts.top_k || cuts.top_p ? Way::kHistogram : Way::kSums;
}

// ---------------------------------------------------------------- tiles

template <class T>
class Tiles {
 public:
  static constexpr int P = kPack<T>;
  static constexpr int kTokens = kWarp * P;

  __device__ Tiles(const T* x, const int32_t* counts, const Penalties& penalties, int V)
      : x_(x),
        counts_(counts),
        penalties_(penalties),
        V_(V),
        before_(static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T))) {}

  // The lane's first token of the tile; outside the row there is none.
  __device__ __forceinline__ int first(int tile) const {
    return tile * kTokens + lane() * P - before_;
  }
  __device__ __forceinline__ int tile_of(int v) const { return (v + before_) / kTokens; }
  __device__ __forceinline__ bool has(int v) const {
    return static_cast<unsigned>(v) < static_cast<unsigned>(V_);
  }

  __device__ __forceinline__ uint4 fetch(int tile) const {
    const int v = first(tile);
    return whole(v) ? load_bits(x_ + v) : uint4{0, 0, 0, 0};
  }

  // The lane's scores from what was fetched; -inf where there is no token.
  __device__ __forceinline__ void scores(int tile, uint4 bits, float (&y)[P]) const {
    const int v = first(tile);
    if (whole(v) && !counts_) {
      AccOf<T> x[P];
      unpack(TypeTag<T>{}, bits, x);
#pragma unroll
      for (int i = 0; i < P; ++i) y[i] = score_of(static_cast<float>(x[i]), 0, penalties_);
    } else {
#pragma unroll
      for (int i = 0; i < P; ++i) y[i] = has(v + i) ? score(v + i) : -__builtin_inff();
    }
  }

  __device__ float score(int64_t v) const {
    return score_of(static_cast<float>(load1(x_ + v)), counts_ ? counts_[v] : 0, penalties_);
  }

 private:
  __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ __forceinline__ bool whole(int v) const { return v >= 0 && v + P <= V_; }

  const T* x_;             // [V]
  const int32_t* counts_;  // [V] or null
  Penalties penalties_;
  int V_;
  int before_;  // elements from a 16-byte boundary to the row
};

// Calls add(state of the run, tile, scores) for the tiles of `runs`, whose loads are in flight
// together, and then end(run, state). A run of -1 is none.
template <class State, int kRuns, class T, class Add, class End>
__device__ __forceinline__ void over_tiles(const SamplePlan& plan, const Tiles<T>& tiles,
                                           const int (&runs)[kRuns], Add add, End end) {
  State states[kRuns];
#pragma unroll 1
  for (int t = 0; t < plan.run_tiles; ++t) {
    uint4 bits[kRuns];
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      if (runs[u] >= 0) bits[u] = tiles.fetch(runs[u] * plan.run_tiles + t);
    }
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      if (runs[u] < 0) continue;
      const int tile = runs[u] * plan.run_tiles + t;
      float y[Tiles<T>::P];
      tiles.scores(tile, bits[u], y);
      add(states[u], tile, y);
    }
  }
#pragma unroll
  for (int u = 0; u < kRuns; ++u) {
    if (runs[u] >= 0) end(runs[u], states[u]);
  }
}

// From which end of the row. Each pass begins where the one before has ended: what that has read
// last is still in the second-level cache, of many rows not what it has read first.
enum class Walk { kForward, kBackward };
template <Walk kWalk>
__device__ __forceinline__ int walked(const SamplePlan& plan, int i) {
  return kWalk == Walk::kForward ? i : plan.runs - 1 - i;
}

// The warp's runs of a row are every run_step(plan)-th of those walked, from its first on.
__device__ __forceinline__ int run_step(const SamplePlan& plan) { return plan.blocks * kPassWarps; }
__device__ __forceinline__ int first_run(const SamplePlan& plan) {
  return static_cast<int>(blockIdx.x) % plan.blocks * kPassWarps +
         static_cast<int>(threadIdx.x) / kWarp;
}

// over_tiles of all of the warp's runs.
template <class State, int kRuns, Walk kWalk, class T, class Add, class End>
__device__ __forceinline__ void over_runs(const SamplePlan& plan, const Tiles<T>& tiles, Add add,
                                          End end) {
  const int step = run_step(plan);
#pragma unroll 1
  for (int first = first_run(plan); first < plan.runs; first += kRuns * step) {
    int runs[kRuns];
#pragma unroll
    for (int u = 0; u < kRuns; ++u) {
      const int i = first + u * step;
      runs[u] = i < plan.runs ? walked<kWalk>(plan, i) : -1;
    }
    over_tiles<State>(plan, tiles, runs, add, end);
  }
}

// over_tiles of those runs of the warp that want(run) is true of. A lane asks for each of 32, so
// that what want() reads comes at once.
template <class State, int kRuns, Walk kWalk, class T, class Want, class Add, class End>
__device__ __forceinline__ void over_runs_where(const SamplePlan& plan, const Tiles<T>& tiles,
                                                Want want, Add add, End end) {
  const int step = run_step(plan);
#pragma unroll 1
  for (int first = first_run(plan); first < plan.runs; first += kWarp * step) {
    const int own = first + static_cast<int>(threadIdx.x) % kWarp * step;
    unsigned wanted = __ballot_sync(kAllLanes, own < plan.runs && want(walked<kWalk>(plan, own)));
#pragma unroll 1
    while (wanted != 0) {
      int runs[kRuns];
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        const int i = first + (__ffs(static_cast<int>(wanted)) - 1) * step;
        runs[u] = wanted == 0 ? -1 : walked<kWalk>(plan, i);
        wanted &= wanted - 1;
      }
      over_tiles<State>(plan, tiles, runs, add, end);
    }
  }
}

// ---------------------------------------------------------------- what a block knows of its row

template <class T>
__device__ const T* logits_of(const SampleArgs& args, int64_t b) {
  return static_cast<const T*>(args.logits) + args.logits_rows.offset(b);
}
__device__ inline const int32_t* counts_of(const SampleArgs& args, int64_t b) {
  return args.token_counts ? args.token_counts + b * args.V : nullptr;
}
__device__ inline Penalties penalties_of(const SampleArgs& args, int64_t b) {
  return {.repetition = static_cast<float>(args.repetition_penalty.at(b)),
          .presence = static_cast<float>(args.presence_penalty.at(b)),
          .frequency = static_cast<float>(args.frequency_penalty.at(b))};
}

template <class T>
__device__ Tiles<T> tiles_of(const SampleArgs& args, int64_t b) {
  return Tiles<T>(logits_of<T>(args, b), counts_of(args, b), penalties_of(args, b),
                  static_cast<int>(args.V));
}
// Of x, without penalties.
template <class T>
__device__ Tiles<T> model_tiles_of(const SampleArgs& args, int64_t b) {
  return Tiles<T>(logits_of<T>(args, b), nullptr, {}, static_cast<int>(args.V));
}

// Bins by how far a score is below the largest: they need only grow with that, for nothing that is
// decided depends on where one ends.
struct Depth {
  float max, scale;

  __device__ Depth(float max, float span)
      : max(max), scale(span > 1e-30f ? static_cast<float>(kDepths) / span : 0.0f) {}
  // NaN (-inf without a scale) is the last. Adding 2^23 leaves the nearest integer in the mantissa.
  __device__ __forceinline__ int of(float y) const {
    const float depth = ::fminf((max - y) * scale, static_cast<float>(kDepths - 1));
    return static_cast<int>(bits_as<uint32_t>(depth + 8388608.0f) & (kDepths - 1));
  }
};

// Of the runs' largest scores: the largest, and the smallest of those that are not masked.
struct Extent {
  float max, least;
  bool finite;
};
__device__ inline Extent extent_of(const SamplePlan& plan, const uint32_t* run_keys) {
  const BlockGroup group;
  KeyRange range = kNoKeys;
  for (int run = group.rank(); run < plan.runs; run += group.size()) {
    const uint32_t key = run_keys[run];
    const bool spreads = key >= key_of(kMasked);
    if (key > kLowestKey) range = both(range, {spreads ? key : kNoKeys.low, key});
  }
  range = group.reduce(range, kNoKeys, both);
  const float max = score_of_key(range.high);
  const float least = range.low < range.high ? score_of_key(range.low) : max;
  return {max, least, range.high > 0 && is_finite(max)};
}

// The masses of softmax(x).
__device__ inline Measure model_masses(const SampleArgs& args, const SamplePlan& plan,
                                       const RowSpace& space) {
  const uint32_t* keys = args.token_counts ? space.model_keys : space.run_keys;
  return masses_of(extent_of(plan, keys).max, 1, args.V);
}

// The bins of a row's histograms. From e^-31.2 on no mass is left, so that of masses need reach no
// further, and then has none in its last bin. Of many random scores the runs' least maximum is
// above the median: three times as far nearly all have their own bin. Of few different scores it
// may be the largest, which says nothing.
__device__ inline Depth depth_of_row(const SampleArgs& args, int64_t b, const Extent& extent) {
  const float spread = 3 * (extent.max - extent.least);
  const float reach = 32 * static_cast<float>(args.temperature.at(b));
  const bool far = spread == 0 || (args.top_p.at(b) < 1 && reach < spread);
  return Depth(extent.max, far ? reach : spread);
}

// ---------------------------------------------------------------- launches

// All passes before the draw, of a row's plan.blocks blocks each (sample_passes.cu).
void sample_passes(const SampleArgs& args, const SamplePlan& plan, Stream stream);

}  // namespace seqkern::cuda
