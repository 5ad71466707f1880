// The passes over the tokens of long rows (sample.cu), by blocks that share a row.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/sample_split.cuh"

namespace seqkern::cuda {
namespace {

// ---------------------------------------------------------------- parts of a pass

// A token of score -inf (banned, or outside the row) has none, and stays or not without a
// difference: lists and counts leave it out.
__device__ __forceinline__ bool has_mass(float y) { return y > -__builtin_inff(); }

// Lists the tokens v of those lanes that say so. Every lane of a warp calls this.
__device__ __forceinline__ void list_token(const RowSpace& space, bool listed, float y, int v) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned lanes = __ballot_sync(kAllLanes, listed);
  if (lanes == 0) return;
  unsigned at = 0;
  if (lane == 0) at = atomicAdd(&space.state->listed, static_cast<unsigned>(__popc(lanes)));
  at = __shfl_sync(kAllLanes, at, 0) + static_cast<unsigned>(__popc(lanes & ((1u << lane) - 1)));
  if (listed && at < kListed) space.list[at] = make_uint2(key_of(y), static_cast<unsigned>(v));
}

struct Nothing {};
struct Total {
  unsigned long long sum = 0;
};

// Every run's largest score, as a key; that of NaN is above all others.
template <class T>
__device__ void store_maxima(const SamplePlan& plan, const Tiles<T>& tiles, uint32_t* run_keys) {
  struct Largest {
    float y = -__builtin_inff();
  };
  over_runs<Largest, kUnroll<T>, Walk::kForward>(
      plan, tiles,
      [](Largest& largest, int, const float (&y)[Tiles<T>::P]) {
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) largest.y = max_or_nan(largest.y, y[i]);
      },
      [=](int run, const Largest& largest) {
        const float y = largest.y;
        const uint32_t of_run = warp_max(y != y ? 0xffffffffu : key_of(y));
        if (threadIdx.x % kWarp == 0) run_keys[run] = of_run;
      });
}

// Adds the block's part of the sum under softmax(x).
template <class T>
__device__ void add_model_sum(const SampleArgs& args, const SamplePlan& plan, int64_t b,
                              const RowSpace& space) {
  const Measure mass = model_masses(args, plan, space);
  unsigned long long sum = 0;
  over_runs<Nothing, kMassUnroll<T>, Walk::kBackward>(
      plan, model_tiles_of<T>(args, b),
      [&](Nothing, int, const float (&y)[Tiles<T>::P]) {
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) sum += mass.mass_at(y[i]);
      },
      [](int, Nothing) {});
  sum = block_sum(sum);
  if (threadIdx.x == 0) atomicAdd(&space.state->model_sum, sum);
}

// For over_runs: stores a run's sum.
__device__ __forceinline__ void store_total(const RowSpace& space, int run, const Total& total) {
  const unsigned long long sum = warp_sum(total.sum);
  if (threadIdx.x % kWarp == 0) space.run_sums[run] = sum;
}

// ---------------------------------------------------------------- passes of many blocks per row

template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sample_maxima_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = plan.first + blockIdx.x / static_cast<unsigned>(plan.blocks);
  const RowSpace space(plan, args.workspace, b);
  if (blockIdx.x % static_cast<unsigned>(plan.blocks) == 0) {
    for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads) {
      space.masses[bin] = 0;
      space.counts[bin] = 0;
    }
    // As a list of all that stays wants it; the gather pass knows more.
    if (threadIdx.x == 0) *space.state = {0, args.top_k.at(b), 0, 0, 0};
  }
  store_maxima(plan, tiles_of<T>(args, b), space.run_keys);
  if (args.model_logprob && args.token_counts) {
    store_maxima(plan, model_tiles_of<T>(args, b), space.model_keys);
  }
}

struct DepthShared {
  Bin masses[kDepths];  // in a list's search, counts
  unsigned counts[kDepths];
};

template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sample_scan_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = plan.first + blockIdx.x / static_cast<unsigned>(plan.blocks);
  const Way way = way_of(args, plan, b);
  if (way == Way::kGreedy && !args.model_logprob) return;
  const RowSpace space(plan, args.workspace, b);
  const Extent extent = extent_of(plan, space.run_keys);
  if (!extent.finite) return;
  if (args.model_logprob) add_model_sum<T>(args, plan, b, space);
  if (way == Way::kGreedy) return;
  const Tiles<T> tiles = tiles_of<T>(args, b);
  Measure mass = masses_of(extent.max, args.temperature.at(b), args.V);
  if (way == Way::kSums) {
    const uint64_t least = least_mass(args.min_p.at(b), mass.unit);
    over_runs_where<Total, kMassUnroll<T>, Walk::kBackward>(
        plan, tiles,
        [&](int run) {
          // Masses fall with the score up to their rounding only: what is but little too small may
          // stand before others that are not.
          const uint64_t largest = mass.mass_at(score_of_key(space.run_keys[run]));
          const bool wanted = largest + largest / 1024 + 1 >= least;
          if (!wanted) space.run_sums[run] = 0;
          return wanted;
        },
        [&](Total& total, int, const float (&y)[Tiles<T>::P]) {
#pragma unroll
          for (int i = 0; i < Tiles<T>::P; ++i) {
            const uint64_t amount = mass.mass_at(y[i]);
            total.sum += amount >= least ? amount : 0;
          }
        },
        [&](int run, const Total& total) { store_total(space, run, total); });
    return;
  }
  DepthShared& shared = cuda::shared<DepthShared>();
  for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads) {
    shared.masses[bin] = {0, 0};
    shared.counts[bin] = 0;
  }
  // Orders the zeros before the additions.
  __syncthreads();
  if (way == Way::kList) {
    const Depth depth(extent.max, extent.max - extent.least);
    for (int run = static_cast<int>(threadIdx.x); run < plan.runs; run += kPassThreads)
      add_to(shared.masses[depth.of(score_of_key(space.run_keys[run]))], 1);
    // Orders the additions before the search.
    __syncthreads();
    const int64_t k = args.top_k.at(b);
    const int bound =
        find_bin<kDepths>(shared.masses, [=](uint64_t) { return static_cast<uint64_t>(k); }).bin;
    over_runs_where<Nothing, kListUnroll, Walk::kBackward>(
        plan, tiles, [&](int run) { return depth.of(score_of_key(space.run_keys[run])) <= bound; },
        [&](Nothing, int tile, const float (&y)[Tiles<T>::P]) {
          const int v = tiles.first(tile);
#pragma unroll
          for (int i = 0; i < Tiles<T>::P; ++i)
            list_token(space, has_mass(y[i]) && depth.of(y[i]) <= bound, y[i], v + i);
        },
        [](int, Nothing) {});
    return;
  }
  const Depth depth = depth_of_row(args, b, extent);
  const Cuts cuts = cuts_of(args, b);
  over_runs<Nothing, kMassUnroll<T>, Walk::kBackward>(
      plan, tiles,
      [&](Nothing, int, const float (&y)[Tiles<T>::P]) {
        int bins[Tiles<T>::P];
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) bins[i] = depth.of(y[i]);
        if (cuts.top_p) {
          uint64_t amounts[Tiles<T>::P];
#pragma unroll
          for (int i = 0; i < Tiles<T>::P; ++i) amounts[i] = mass.mass_at(y[i]);
          add_to(shared.masses, bins, amounts);
        }
        if (cuts.top_k) {
#pragma unroll
          for (int i = 0; i < Tiles<T>::P; ++i) {
            if (has_mass(y[i])) atomicAdd(&shared.counts[bins[i]], 1u);
          }
        }
      },
      [](int, Nothing) {});
  // Orders the additions before the block's part of the row's histograms is read.
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads) {
    const unsigned long long sum = shared.masses[bin].sum();
    if (sum > 0) atomicAdd(&space.masses[bin], sum);
    if (shared.counts[bin] > 0) atomicAdd(&space.counts[bin], shared.counts[bin]);
  }
}

template <class T>
struct PackedShared {
  float y[kPassWarps][Tiles<T>::kTokens];
};

// The lane's part of the sum of a tile's masses of at least `least` in bins before `end`, of which
// there are few as a rule: they are packed, so that a lane has one or none instead of each lane
// waiting for those of all others.
template <class T>
__device__ __forceinline__ uint64_t sum_of_masses(const Measure& mass, uint64_t least,
                                                  const float (&y)[Tiles<T>::P],
                                                  const int (&bins)[Tiles<T>::P], int end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float* packed = cuda::shared<PackedShared<T>>().y[threadIdx.x / kWarp];
  int n = 0;
  // Orders the reads of the earlier tile before these writes.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Tiles<T>::P; ++i) {
    const unsigned lanes = __ballot_sync(kAllLanes, bins[i] < end);
    if (bins[i] < end) packed[n + __popc(lanes & ((1u << lane) - 1))] = y[i];
    n += __popc(lanes);
  }
  // Orders the scores before the lanes' reads.
  __syncwarp();
  uint64_t sum = 0;
#pragma unroll 1
  for (int i = lane; i < n; i += kWarp) {
    const uint64_t amount = mass.mass_at(packed[i]);
    sum += amount >= least ? amount : 0;
  }
  return sum;
}

// The bins whose tokens are listed: [first, last], in which the last score that stays is, and the
// one in which top-k ends.
struct ListedBins {
  int first, last, kth;

  __device__ __forceinline__ bool has(int bin) const {
    return (bin >= first && bin <= last) || bin == kth;
  }
};

// Into `state` what the list is read with. What top-p needs depends on the masses that top-k
// leaves, and those of the bin in which top-k ends are known only when its tokens are listed and
// ranked. But all bins in which top-p can end are known, between none and all of these masses:
// mostly one.
__device__ inline ListedBins bins_to_list(const SampleArgs& args, int64_t b, const RowSpace& space,
                                          RowState& state) {
  const Cuts cuts = cuts_of(args, b);
  FoundBin kth = {.bin = kDepths, .rest = 0};
  if (cuts.top_k) {
    const uint64_t k = static_cast<uint64_t>(args.top_k.at(b));
    kth = find_bin<kDepths>(bins_in_shared<kDepths>(space.counts),
                            [=](uint64_t all) { return k < all ? k : all; });
  }
  if (!cuts.top_p) {
    state.k = static_cast<int64_t>(kth.rest);
    return {kth.bin, kth.bin, kth.bin};
  }
  const double top_p = args.top_p.at(b);
  const Bin* masses = bins_in_shared<kDepths>(space.masses);
  const auto mass_of = [=](int bin) { return masses[bin].sum(); };
  uint64_t above = cuts.top_k ? sum_of_bins(0, kth.bin, mass_of) : 0;
  const FoundBin least = find_bin<kDepths>(masses, [&](uint64_t all) {
    if (!cuts.top_k) above = all;
    return need_of_top_p(top_p, above);
  });
  // Without mass it makes no difference which of the bin's tokens top-k leaves.
  const uint64_t at_kth = cuts.top_k ? mass_of(kth.bin) : 0;
  const int last = at_kth == 0 ? least.bin : find_bin<kDepths>(masses, [=](uint64_t) {
                                               return need_of_top_p(top_p, above + at_kth);
                                             }).bin;
  // Of what is listed, what is above the bin in which top-k ends.
  const int end = last < kth.bin ? last + 1 : kth.bin;
  state.before = need_of_top_p(top_p, above) - least.rest;
  state.unlisted = above - sum_of_bins(least.bin, end, mass_of);
  state.k = 0;
  if (at_kth > 0) {
    const auto count_of = [=](int bin) { return space.counts[bin]; };
    state.k = static_cast<int64_t>(kth.rest + sum_of_bins(least.bin, end, count_of));
  }
  return {least.bin, last, at_kth > 0 ? kth.bin : last};
}

template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sample_gather_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = plan.first + blockIdx.x / static_cast<unsigned>(plan.blocks);
  if (way_of(args, plan, b) != Way::kHistogram) return;
  const RowSpace space(plan, args.workspace, b);
  const Extent extent = extent_of(plan, space.run_keys);
  if (!extent.finite) return;
  RowState wanted = {};
  const ListedBins listed = bins_to_list(args, b, space, wanted);
  if (blockIdx.x % static_cast<unsigned>(plan.blocks) == 0 && threadIdx.x == 0) {
    space.state->k = wanted.k;
    space.state->before = wanted.before;
    space.state->unlisted = wanted.unlisted;
  }
  const Depth depth = depth_of_row(args, b, extent);
  const Tiles<T> tiles = tiles_of<T>(args, b);
  const Measure mass = masses_of(extent.max, args.temperature.at(b), args.V);
  const uint64_t least = least_mass(args.min_p.at(b), mass.unit);
  over_runs_where<Total, kMassUnroll<T>, Walk::kForward>(
      plan, tiles,
      [&](int run) {
        const bool wanted = depth.of(score_of_key(space.run_keys[run])) <= listed.kth;
        if (!wanted) space.run_sums[run] = 0;
        return wanted;
      },
      [&](Total& total, int tile, const float (&y)[Tiles<T>::P]) {
        const int v = tiles.first(tile);
        int bins[Tiles<T>::P];
        bool before = false, in = false;
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) {
          bins[i] = depth.of(y[i]);
          before |= bins[i] < listed.first;
          in |= listed.has(bins[i]);
        }
        if (__any_sync(kAllLanes, before))
          total.sum += sum_of_masses<T>(mass, least, y, bins, listed.first);
        if (__any_sync(kAllLanes, in)) {
#pragma unroll
          for (int i = 0; i < Tiles<T>::P; ++i)
            list_token(space, has_mass(y[i]) && listed.has(bins[i]), y[i], v + i);
        }
      },
      [&](int run, const Total& total) { store_total(space, run, total); });
}

// ---------------------------------------------------------------- launches

// Whether a row can go by way of a histogram, as far as the host knows.
bool may_want_histogram(const SampleArgs& args, const SamplePlan& plan) {
  const auto& k = args.top_k;
  if (!k.rows && k.value > 0 && k.value <= plan.most_listed()) return false;
  return k.rows || args.top_p.rows || args.top_p.value < 1 || (k.value > 0 && k.value < args.V);
}

}  // namespace

void sample_passes(const SampleArgs& args, const SamplePlan& plan, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto kernel) {
      launch(kernel,
             {.name = "sample",
              .grid = static_cast<unsigned>(plan.rows * plan.blocks),
              .block = kPassThreads,
              .stream = stream},
             args, plan);
    };
    run(sample_maxima_kernel<T>);
    const bool greedy = !args.temperature.rows && args.temperature.value == 0;
    if (!greedy || args.model_logprob) run(sample_scan_kernel<T>);
    if (!greedy && may_want_histogram(args, plan)) run(sample_gather_kernel<T>);
  });
}

void visit_sample_passes_kernels(VisitKernel visit, void* context) {
  const auto of_type = [&](auto tag, const std::string& name) {
    using T = typename decltype(tag)::type;
    const auto kernel = [&](const char* pass, auto function) {
      visit(context, ("sample " + std::string(pass) + "<" + name + ">").c_str(),
            reinterpret_cast<const void*>(function));
    };
    kernel("maxima", &sample_maxima_kernel<T>);
    kernel("scan", &sample_scan_kernel<T>);
    kernel("gather", &sample_gather_kernel<T>);
  };
  of_type(TypeTag<float>{}, "float32");
  of_type(TypeTag<double>{}, "float64");
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
