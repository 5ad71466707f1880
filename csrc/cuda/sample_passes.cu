// The passes over the tokens of long rows (sample.cu), by blocks that share a row.
#include <string>

#include "cuda/launch.cuh"
#include "cuda/sample_split.cuh"

namespace seqkern::cuda {
namespace {

// ---------------------------------------------------------------- parts of a pass

// Lists the tokens that test(score), of the runs that want(run). Every lane of a warp calls this.
template <class T, class Want, class Test>
__device__ void list_tokens(const SamplePlan& plan, const RowSpace& space, const Tiles<T>& tiles,
                            Want want, Test test) {
  struct Nothing {};
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  over_runs<Nothing>(
      plan, tiles, want,
      [&](Nothing, int tile, const float (&y)[Tiles<T>::P]) {
        const int v = tiles.first(tile);
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) {
          const bool listed = tiles.has(v + i) && test(y[i]);
          const unsigned lanes = __ballot_sync(kAllLanes, listed);
          if (lanes == 0) continue;
          unsigned at = 0;
          if (lane == 0) at = atomicAdd(&space.state->listed, static_cast<unsigned>(__popc(lanes)));
          at = __shfl_sync(kAllLanes, at, 0) +
               static_cast<unsigned>(__popc(lanes & ((1u << lane) - 1)));
          if (listed && at < kListed) {
            space.list[at] = make_uint2(key_of(y[i]), static_cast<unsigned>(v + i));
          }
        }
      },
      [](int, bool, Nothing) {});
}

// The sums of what stays, run by run.
template <class T>
__device__ void sum_runs(const SamplePlan& plan, const RowSpace& space, const Tiles<T>& tiles,
                         const Measure& mass) {
  struct Total {
    unsigned long long sum = 0;
  };
  over_runs<Total>(
      plan, tiles,
      [&](int run) {
        const uint32_t key = space.run_keys[run];
        if (key < mass.kept.key) return false;
        if (mass.kept.min_mass == 0) return true;
        // Masses fall with the score up to their rounding only: what is but little too small may
        // stand before others that are not.
        const uint64_t largest = mass.mass_at(score_of_key(key));
        return largest + largest / 1024 + 1 >= mass.kept.min_mass;
      },
      [&](Total& total, int tile, const float (&y)[Tiles<T>::P]) {
        const int v = tiles.first(tile);
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) total.sum += mass.of(y[i], v + i);
      },
      [&](int run, bool wanted, const Total& total) {
        const unsigned long long sum = wanted ? warp_sum(total.sum) : 0;
        if (threadIdx.x % kWarp == 0) space.run_sums[run] = sum;
      });
}

// ---------------------------------------------------------------- passes of many blocks per row

template <class T>
__global__ void __launch_bounds__(kPassThreads)
    sample_maxima_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = blockIdx.x / static_cast<unsigned>(plan.blocks);
  const RowSpace space(plan, args.workspace, b);
  if (blockIdx.x % static_cast<unsigned>(plan.blocks) == 0) {
    for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads)
      space.histogram[bin] = 0;
    if (threadIdx.x == 0) space.state->listed = 0;
  }
  struct Largest {
    float y = -__builtin_inff();
    bool nan = false;
  };
  over_runs<Largest>(
      plan, tiles_of<T>(args, b), [](int) { return true; },
      [](Largest& largest, int, const float (&y)[Tiles<T>::P]) {
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) {
          largest.y = ::fmaxf(largest.y, y[i]);
          largest.nan |= y[i] != y[i];
        }
      },
      [&](int run, bool, const Largest& largest) {
        const uint32_t key = largest.nan ? 0xffffffffu : key_of(largest.y);
        const uint32_t of_run = warp_reduce(KeyRange{key, key}, both).high;
        if (threadIdx.x % kWarp == 0) space.run_keys[run] = of_run;
      });
}

struct DepthShared {
  Bin bins[kDepths];
};

__device__ void clear(DepthShared& shared) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads)
    shared.bins[bin] = {0, 0};
  // Orders the zeros before the additions.
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kPassThreads)
    sample_scan_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = blockIdx.x / static_cast<unsigned>(plan.blocks);
  const Way way = way_of(args, plan, b);
  if (way == Way::kGreedy || way == Way::kAlone) return;
  const RowSpace space(plan, args.workspace, b);
  const Extent extent = extent_of(plan, space);
  if (!extent.finite) return;
  const Tiles<T> tiles = tiles_of<T>(args, b);
  Measure mass = masses_of(extent.max, args.temperature.at(b), args.V);
  if (way == Way::kSums) {
    mass.kept.min_mass = least_mass(args.min_p.at(b), mass.unit);
    sum_runs(plan, space, tiles, mass);
    return;
  }
  DepthShared& shared = cuda::shared<DepthShared>();
  clear(shared);
  if (way == Way::kList) {
    const Depth depth(extent.max, extent.max - extent.least);
    for (int run = static_cast<int>(threadIdx.x); run < plan.runs; run += kPassThreads)
      add_to(shared.bins[depth.of(score_of_key(space.run_keys[run]))], 1);
    // Orders the additions before the search.
    __syncthreads();
    const int64_t k = args.top_k.at(b);
    const int bound =
        find_bin<kDepths>(shared.bins, [=](uint64_t) { return static_cast<uint64_t>(k); }).bin;
    list_tokens(
        plan, space, tiles,
        [&](int run) { return depth.of(score_of_key(space.run_keys[run])) <= bound; },
        [&](float y) { return depth.of(y) <= bound; });
    return;
  }
  const Depth depth = depth_of_masses(args, b, extent);
  const bool count = !(args.top_p.at(b) < 1);
  struct Nothing {};
  over_runs<Nothing>(
      plan, tiles, [](int) { return true; },
      [&](Nothing, int tile, const float (&y)[Tiles<T>::P]) {
        const int v = tiles.first(tile);
#pragma unroll
        for (int i = 0; i < Tiles<T>::P; ++i) {
          const uint64_t amount = !tiles.has(v + i) ? 0 : count ? 1 : mass.mass_at(y[i]);
          if (amount > 0) add_to(shared.bins[depth.of(y[i])], amount);
        }
      },
      [](int, bool, Nothing) {});
  // Orders the additions before the block's part of the row's histogram is read.
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads) {
    const unsigned long long sum = shared.bins[bin].sum();
    if (sum > 0) atomicAdd(&space.histogram[bin], sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kPassThreads)
    sample_gather_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = blockIdx.x / static_cast<unsigned>(plan.blocks);
  if (way_of(args, plan, b) != Way::kHistogram) return;
  const RowSpace space(plan, args.workspace, b);
  const Extent extent = extent_of(plan, space);
  if (!extent.finite) return;
  DepthShared& shared = cuda::shared<DepthShared>();
  for (int bin = static_cast<int>(threadIdx.x); bin < kDepths; bin += kPassThreads) {
    const unsigned long long sum = space.histogram[bin];
    shared.bins[bin] = {static_cast<unsigned>(sum), static_cast<unsigned>(sum >> 32)};
  }
  // Orders the copy before the search.
  __syncthreads();
  const double top_p = args.top_p.at(b);
  const int64_t k = args.top_k.at(b);
  const FoundBin found = find_bin<kDepths>(shared.bins, [=](uint64_t sum) {
    return top_p < 1 ? need_of_top_p(top_p, sum) : static_cast<uint64_t>(k);
  });
  if (blockIdx.x % static_cast<unsigned>(plan.blocks) == 0 && threadIdx.x == 0) {
    space.state->rest = found.rest;
  }
  const Depth depth = depth_of_masses(args, b, extent);
  list_tokens(
      plan, space, tiles_of<T>(args, b),
      [&](int run) { return depth.of(score_of_key(space.run_keys[run])) <= found.bin; },
      [&](float y) { return depth.of(y) == found.bin; });
}

template <class T>
__global__ void __launch_bounds__(kPassThreads)
    sample_keep_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = blockIdx.x / static_cast<unsigned>(plan.blocks);
  if (way_of(args, plan, b) != Way::kHistogram) return;
  const RowSpace space(plan, args.workspace, b);
  const Extent extent = extent_of(plan, space);
  const unsigned listed = space.state->listed;
  if (!extent.finite || listed > kListed) return;
  const int n = static_cast<int>(listed);
  Measure mass = masses_of(extent.max, args.temperature.at(b), args.V);
  const bool count = !(args.top_p.at(b) < 1);
  const uint64_t rest = space.state->rest;
  const uint2* list = space.list;
  const Reached reached = narrow(
      n,
      [&](int i, uint32_t& key, unsigned long long& amount) {
        key = list[i].x;
        amount = count ? 1 : mass.mass_at(score_of_key(key));
        return true;
      },
      [=](unsigned long long) { return rest; });
  mass.kept.key = reached.key;
  mass.kept.last_tie =
      last_of_ties(list, n, reached.key, count ? reached.rest : tokens_for(mass, reached));
  mass.kept.min_mass = least_mass(args.min_p.at(b), mass.unit);
  if (blockIdx.x % static_cast<unsigned>(plan.blocks) == 0 && threadIdx.x == 0) {
    space.state->kept = mass.kept;
  }
  sum_runs(plan, space, tiles_of<T>(args, b), mass);
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
              .grid = static_cast<unsigned>(args.B * plan.blocks),
              .block = kPassThreads,
              .stream = stream},
             args, plan);
    };
    run(sample_maxima_kernel<T>);
    if (!args.temperature.rows && args.temperature.value == 0) return;
    run(sample_scan_kernel<T>);
    if (!may_want_histogram(args, plan)) return;
    run(sample_gather_kernel<T>);
    run(sample_keep_kernel<T>);
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
    kernel("keep", &sample_keep_kernel<T>);
  };
  of_type(TypeTag<float>{}, "float32");
  of_type(TypeTag<double>{}, "float64");
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
