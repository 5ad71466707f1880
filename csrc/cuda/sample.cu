// Sampling the next token on CUDA. A short row is one block's, which runs the algorithm of
// common/sampling.h. The tokens of a long row are shared by blocks, in launches one after the
// other:
//
//   maxima   every run's largest score
//   scan     by what the row asks for (Way): a list of the tokens that can be among the top-k, or
//            histograms of masses (counts) over the distance from the largest score, or every run's
//            sum of masses; and the sum under softmax(x), where its logarithm is asked for
//   gather   with histograms: the list of the tokens of the bins in which top-p (top-k) can end,
//            and every run's sum of the masses before them
//   draw     a block per row: the last score that stays, and the token, from the list or from the
//            runs' sums
//
// All of these take the decisions of common/sampling.h: sums of integers are the same in any order
// and in any parts, so neither blocks nor atomics change a result. Where more tokens want to be
// listed than there is room for (equal scores), the last launch does it as for a short row.
#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sample_split.cuh"

namespace seqkern::cuda {
namespace {

constexpr unsigned kDrawThreads = 512;
constexpr int kDrawWarps = kDrawThreads / kWarp;
constexpr unsigned kShortThreads = 128;  // of a row that is one block's
static_assert(kDrawThreads >= kRanked * kRankLanes);

// ---------------------------------------------------------------- the draw, by a block per row

struct FromSum {
  int64_t token;
  uint64_t sum;  // of the masses it was drawn from
};

// The list as entries of narrow().
struct ListedMasses {
  const uint2* list;
  const Measure& mass;

  __device__ bool operator()(int i, uint32_t& key, unsigned long long& amount) const {
    const uint2 token = list[i];
    key = token.x;
    amount = mass.of(score_of_key(token.x), token.y);
    return true;
  }
};

// The last score and id that stay after top-k and top-p, which are in the list: into `mass`.
__device__ void keep_from_list(const RowSpace& space, double top_p, Measure& mass) {
  const uint2* list = space.list;
  const RowState state = *space.state;
  const int n = static_cast<int>(state.listed);
  if (state.k > 0) {
    const uint64_t k = static_cast<uint64_t>(state.k);
    const Narrowed kth = narrow(
        n,
        [=](int i, uint32_t& key, unsigned long long& amount) {
          key = list[i].x;
          amount = 1;
          return true;
        },
        // Fewer than k are listed where others are banned.
        [=](uint64_t all) { return k < all ? k : all; });
    mass.kept = {.key = kth.reached.key, .last_tie = last_of_ties(list, n, kth, 1)};
  }
  if (top_p < 1) {
    const Narrowed last = narrow(n, ListedMasses{list, mass}, [=](uint64_t sum) {
      return need_of_top_p(top_p, state.unlisted + sum) - state.before;
    });
    const uint32_t key = last.reached.key;
    const int64_t earlier_cut = key == mass.kept.key ? mass.kept.last_tie : INT64_MAX;
    const int64_t cut = last_of_ties(list, n, last, mass.mass_at(score_of_key(key)));
    mass.kept.key = key;
    // Both cuts among the same ties: the earlier id holds.
    mass.kept.last_tie = earlier_cut < cut ? earlier_cut : cut;
  }
}

// From all that stay.
__device__ FromSum draw_from_list(const SampleArgs& args, int64_t b, const RowSpace& space,
                                  const Measure& mass) {
  const uint2* list = space.list;
  // By rising id: the token is the first with which the running sum exceeds the target.
  const Narrowed drawn = narrow(
      static_cast<int>(space.state->listed),
      [&](int i, uint32_t& key, unsigned long long& amount) {
        ListedMasses{list, mass}(i, key, amount);
        key = ~list[i].y;
        return true;
      },
      [&](uint64_t sum) { return draw_target(args, b, sum) + 1; });
  return {static_cast<int64_t>(~drawn.reached.key), drawn.sum};
}

// Adds what of the list stays to the runs' sums.
template <class T>
__device__ void add_list_to_runs(const SamplePlan& plan, const RowSpace& space,
                                 const Tiles<T>& tiles, const Measure& mass) {
  const uint2* list = space.list;
  const int n = static_cast<int>(space.state->listed);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kDrawThreads) {
    const uint2 token = list[i];
    const uint64_t amount = mass.of(score_of_key(token.x), token.y);
    const int run = tiles.tile_of(static_cast<int>(token.y)) / plan.run_tiles;
    if (amount > 0) atomicAdd(&space.run_sums[run], static_cast<unsigned long long>(amount));
  }
  // Orders the additions, in device memory, before the block reads the sums.
  __syncthreads();
}

struct SumsShared {
  unsigned long long of_thread[kDrawThreads];
};

// From the runs' sums. Every warp searches for itself: no barrier to hand the result out.
template <class T>
__device__ FromSum draw_from_runs(const SampleArgs& args, const SamplePlan& plan, int64_t b,
                                  const RowSpace& space, const Tiles<T>& tiles,
                                  const Measure& mass) {
  SumsShared& shared = cuda::shared<SumsShared>();
  const int rank = static_cast<int>(threadIdx.x), lane = rank % kWarp;
  const int each = ceil_div(plan.runs, static_cast<int>(kDrawThreads));  // up to 8 runs
  const auto sum_of = [&](int run) { return run < plan.runs ? space.run_sums[run] : 0; };
  unsigned long long sum = 0;
  for (int i = 0; i < each; ++i) sum += sum_of(rank * each + i);
  shared.of_thread[rank] = sum;
  // Orders the threads' sums before the searches.
  __syncthreads();
  sum = 0;
  for (int i = 0; i < kDrawWarps; ++i) sum += shared.of_thread[lane * kDrawWarps + i];
  const unsigned long long all = warp_sum(sum);
  Found found = find_lane(sum, draw_target(args, b, all));
  int first = found.lane * kDrawWarps;
  found = find_lane(lane < kDrawWarps ? shared.of_thread[first + lane] : 0, found.target);
  first = (first + found.lane) * each;
  found = find_lane(lane < each ? sum_of(first + lane) : 0, found.target);
  const int run = first + found.lane;
  for (int tile = run * plan.run_tiles;; ++tile) {
    float y[Tiles<T>::P];
    tiles.scores(tile, tiles.fetch(tile), y);
    const int v = tiles.first(tile);
    unsigned long long amounts[Tiles<T>::P];
    sum = 0;
#pragma unroll
    for (int i = 0; i < Tiles<T>::P; ++i) sum += amounts[i] = mass.of(y[i], v + i);
    found = find_lane(sum, found.target);
    if (found.lane < 0) continue;
    int token = v;
    bool passed = true;
#pragma unroll
    for (int i = 0; i < Tiles<T>::P; ++i) {
      passed = passed && amounts[i] <= found.target;
      if (passed) {
        found.target -= amounts[i];
        ++token;
      }
    }
    return {__shfl_sync(kAllLanes, token, found.lane), all};
  }
}

// The lowest id of the largest score.
template <class T>
__device__ int64_t draw_largest(const SamplePlan& plan, const RowSpace& space,
                                const Tiles<T>& tiles, float max) {
  const BlockGroup group;
  const uint32_t key = key_of(max);
  KeyRange found = kNoKeys;
  for (int run = group.rank(); run < plan.runs; run += group.size()) {
    if (space.run_keys[run] == key) found = both(found, {static_cast<uint32_t>(run), 0});
  }
  const int run = static_cast<int>(group.reduce(found, kNoKeys, both).low);
  for (int tile = run * plan.run_tiles;; ++tile) {
    float y[Tiles<T>::P];
    tiles.scores(tile, tiles.fetch(tile), y);
    int token = INT_MAX;
#pragma unroll
    for (int i = Tiles<T>::P - 1; i >= 0; --i) {
      if (y[i] == max) token = tiles.first(tile) + i;
    }
    const unsigned lanes = __ballot_sync(kAllLanes, token != INT_MAX);
    if (lanes != 0) {
      return __shfl_sync(kAllLanes, token, __ffs(static_cast<int>(lanes)) - 1);
    }
  }
}

template <class T>
__device__ Drawn draw_split(const SampleArgs& args, const SamplePlan& plan, int64_t b, Way way) {
  const RowSpace space(plan, args.workspace, b);
  const Extent extent = extent_of(plan, space.run_keys);
  if (!extent.finite) return {-1, __builtin_nan("")};
  const Tiles<T> tiles = tiles_of<T>(args, b);
  if (way == Way::kGreedy) return {draw_largest(plan, space, tiles, extent.max), 0};
  Measure mass = masses_of(extent.max, args.temperature.at(b), args.V);
  if (way != Way::kSums) keep_from_list(space, args.top_p.at(b), mass);
  mass.kept.min_mass = least_mass(args.min_p.at(b), mass.unit);
  if (way == Way::kHistogram) add_list_to_runs(plan, space, tiles, mass);
  const FromSum drawn = way == Way::kList ? draw_from_list(args, b, space, mass)
                                          : draw_from_runs(args, plan, b, space, tiles, mass);
  return {drawn.token, log_probability(mass, tiles.score(drawn.token), drawn.sum)};
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    sample_draw_kernel(SampleArgs args, SamplePlan plan) {
  const int64_t b = plan.first + blockIdx.x;
  const T* x = logits_of<T>(args, b);
  const int V = static_cast<int>(args.V);
  const Penalties penalties = penalties_of(args, b);
  bool alone = plan.runs == 0;
  Drawn drawn;
  if (!alone) {
    const Way way = way_of(args, plan, b);
    alone = RowSpace(plan, args.workspace, b).state->listed > kListed;
    if (!alone) drawn = draw_split<T>(args, plan, b, way);
  }
  if (alone) {
    BlockRow<T> row(x, counts_of(args, b), penalties, V);
    drawn = draw_token(row, args, b);
  }
  double logprob = drawn.logprob;
  if (args.model_logprob && drawn.token >= 0) {
    BlockRow<T> bare(x, nullptr, penalties, V);
    if (plan.runs == 0) {
      logprob = log_softmax_of(bare, args.V, drawn.token);
    } else {
      const RowSpace space(plan, args.workspace, b);
      logprob = log_probability(model_masses(args, plan, space), bare.score(drawn.token),
                                space.state->model_sum);
    }
  }
  if (threadIdx.x == 0) {
    args.token[b] = drawn.token;
    args.logprob[b] = static_cast<float>(logprob);
  }
}

// ---------------------------------------------------------------- launches

SamplePlan plan_of(const SampleArgs& args) {
  SamplePlan plan = {.first = 0, .rows = args.B, .runs = 0, .run_tiles = 0, .blocks = 1};
  if (args.V <= kShortRow) return plan;
  const int64_t pack =
      dispatch_dtype(args.dtype, [](auto tag) { return kPack<typename decltype(tag)::type>; });
  // A row need not begin at a tile's first token.
  const int64_t tiles = ceil_div<int64_t>(args.V + pack - 1, kWarp * pack);
  plan.rows = args.B < kMostRows ? args.B : kMostRows;
  plan.run_tiles = static_cast<int>(ceil_div<int64_t>(tiles, kMostRuns));
  plan.runs = static_cast<int>(ceil_div<int64_t>(tiles, plan.run_tiles));
  return plan;
}

}  // namespace

int64_t sample_workspace(const SampleArgs& args) {
  const SamplePlan plan = plan_of(args);
  return plan.runs > 0 ? plan.rows * RowSpace::bytes(plan) : 0;
}

void sample(const SampleArgs& args, Stream stream) {
  if (args.V > INT_MAX / 2 || args.B > INT_MAX) {
    throw_value_error("sample: logits must have at most 2^30 tokens and 2^31 rows on CUDA, got [" +
                      std::to_string(args.B) + ", " + std::to_string(args.V) + "]");
  }
  SamplePlan plan = plan_of(args);
  if (plan.runs > 0) {
    // As many blocks as are resident at once: more would each scan the runs' maxima and add a
    // histogram of their own.
    const int64_t share = kPassBlocks * int64_t{current_device().multiprocessors} / plan.rows;
    const int64_t most = ceil_div(plan.runs, kPassWarps);
    plan.blocks = static_cast<int>(share < 1 ? 1 : share < most ? share : most);
  }
  const int64_t step = plan.rows;
  for (; plan.first < args.B; plan.first += step) {
    plan.rows = args.B - plan.first < step ? args.B - plan.first : step;
    if (plan.runs > 0) sample_passes(args, plan, stream);
    dispatch_dtype(args.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch(sample_draw_kernel<T>,
             {.name = "sample",
              .grid = static_cast<unsigned>(plan.rows),
              .block = plan.runs > 0 ? kDrawThreads : kShortThreads,
              .stream = stream},
             args, plan);
    });
  }
}

void visit_sample_kernels(VisitKernel visit, void* context) {
  const auto of_type = [&](auto tag, const char* name) {
    using T = typename decltype(tag)::type;
    visit(context, name, reinterpret_cast<const void*>(&sample_draw_kernel<T>));
  };
  of_type(TypeTag<float>{}, "sample<float32>");
  of_type(TypeTag<double>{}, "sample<float64>");
  of_type(TypeTag<Half>{}, "sample<float16>");
  of_type(TypeTag<BFloat16>{}, "sample<bfloat16>");
}

}  // namespace seqkern::cuda
