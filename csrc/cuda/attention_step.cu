// One step of attention with a cache, in one launch: a block takes a run of keys of one key head
// for all query rows that share it, and the last block of a row to finish combines the runs in
// order. Layout and reasons: docs/math/attention_step.md.
#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/mixed.cuh"
#include "cuda/vec.cuh"
#include "ops/attention_step.h"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Said so that the compiler uses the registers this leaves: on its own it saves some and spills.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kRun =
    256;  // keys of a block; fixed, so that a row's result does not depend on others
constexpr int kRows = 8;  // query rows at a time
constexpr int kMaxD = 256;
constexpr int kColumns = kMaxD / kThreads;  // of the output, per thread

template <class Acc>
struct StepShared {
  Acc q[kRows][kMaxD];      // scaled and rotated; later the partial sums of groups of threads
  Acc scores[kRows][kRun];  // then exp(score - max)
  Acc max[kRows], sum[kRows];
  int last;  // whether this block combines
};

// A block's place.
struct StepWork {
  int b, head, run;
  int position;    // of the first new token
  int tokens;      // new tokens that fit into the cache
  int runs;        // of the row that hold tokens, at least 1
  int begin, end;  // keys of this run
};

__device__ __forceinline__ StepWork find_step(const AttentionStepArgs& a) {
  StepWork w;
  w.run = static_cast<int>(blockIdx.x);
  w.head = static_cast<int>(blockIdx.y);
  w.b = static_cast<int>(blockIdx.z);
  const int64_t p = a.positions[w.b];
  // What cannot be checked without waiting for the device must not become an access outside.
  const int64_t fits = p < 0 ? 0 : a.L - p;
  w.position = static_cast<int>(p < 0 || p > a.L ? a.L : p);
  w.tokens = static_cast<int>(fits < 0 ? 0 : fits < a.S ? fits : a.S);
  const int length = w.position + w.tokens;
  w.runs = max(1, ceil_div(length, kRun));
  const int oldest =
      a.window > 0 && a.window <= w.position ? w.position + 1 - static_cast<int>(a.window) : 0;
  w.begin = max(w.run * kRun, oldest);
  w.end = min((w.run + 1) * kRun, length);
  return w;
}

template <class T>
__device__ __forceinline__ T* head_at(const void* base, const HeadStrides& s, int b, int h, int t) {
  return static_cast<T*>(const_cast<void*>(base)) + b * s.b + h * s.h + t * s.t;
}

// Element d of x [D], of the token at position p, rotated.
template <class Acc, class T>
__device__ __forceinline__ Acc rotated(const AttentionStepArgs& a, const T* x, int d, int p) {
  const Acc mine = load1(x + d);
  if (!a.cos || d >= a.R) return mine;
  const int half = static_cast<int>(a.R) / 2;
  const int pair = a.interleaved ? d / 2 : d % half;
  const bool second = a.interleaved ? d % 2 != 0 : d >= half;
  const int distance = a.interleaved ? 1 : half;
  const Acc other = load1(x + (second ? d - distance : d + distance));
  const int64_t at = static_cast<int64_t>(p) * half + pair;
  const Acc cos = static_cast<Acc>(a.cos[at]), sin = static_cast<Acc>(a.sin[at]);
  return second ? mine * cos + other * sin : mine * cos - other * sin;
}

// ---------------------------------------------------------------- a run of keys

// New tokens that belong to this run, into the cache.
template <class T, class C>
__device__ void append(const AttentionStepArgs& a, const StepWork& w) {
  using Acc = AccOf<T>;
  const int D = static_cast<int>(a.D);
  for (int s = 0; s < w.tokens; ++s) {
    const int p = w.position + s;
    if (p < w.run * kRun || p >= w.end) continue;
    const T* k = head_at<T>(a.k_new, a.k_new_strides, w.b, w.head, s);
    const T* v = head_at<T>(a.v_new, a.v_new_strides, w.b, w.head, s);
    C* k_to = head_at<C>(a.k_cache, a.k_cache_strides, w.b, w.head, p);
    C* v_to = head_at<C>(a.v_cache, a.v_cache_strides, w.b, w.head, p);
    for (int d = static_cast<int>(threadIdx.x); d < D; d += kThreads) {
      store1(k_to + d, rotated<Acc>(a, k, d, p));
      store1(v_to + d, static_cast<Acc>(load1(v + d)));
    }
  }
}

template <class C, class Acc, int P>
__device__ __forceinline__ void load_pack(const C* x, int d, int D, Acc (&v)[P]) {
  if (d + P <= D) {
    load_run<P>(x + d, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < P; ++i) v[i] = d + i < D ? static_cast<Acc>(load1(x + d + i)) : Acc(0);
}

// Scores of `rows` query rows: some lanes of a warp share a key, each reading 16 bytes of it.
template <class C, class Acc>
__device__ void make_scores(const AttentionStepArgs& a, const StepWork& w, int rows,
                            StepShared<Acc>& shared) {
  constexpr int P = kPack<C>;
  const int D = static_cast<int>(a.D);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int lanes = 1;
  while (lanes < kWarp && lanes * P < D) lanes *= 2;
  const int keys = kWarp / lanes;  // of a warp at a time
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // All lanes take part in each exchange, so the loop is the same for all.
  for (int first = w.begin + warp * keys; first < w.end; first += kWarps * keys) {
    const int key = first + lane / lanes;
    Acc sum[kRows] = {};
    if (key < w.end) {
      const C* k = head_at<C>(a.k_cache, a.k_cache_strides, w.b, w.head, key);
      for (int d = lane % lanes * P; d < D; d += lanes * P) {
        Acc x[P];
        load_pack(k, d, D, x);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
#pragma unroll
          for (int i = 0; i < P; ++i) {
            if (d + i < D) sum[r] += shared.q[r][d + i] * x[i];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int delta = lanes / 2; delta > 0; delta /= 2) {
        sum[r] += __shfl_xor_sync(kAllLanes, sum[r], delta);
      }
      if (r < rows && lane % lanes == 0 && key < w.end) {
        shared.scores[r][key - w.run * kRun] = sum[r];
      }
    }
  }
}

// Of each row: its largest score, exp(score - max) in its place, and their sum. A warp per row.
template <class Acc>
__device__ void softmax_rows(const AttentionStepArgs& a, const StepWork& w, int row0, int rows,
                             StepShared<Acc>& shared) {
  constexpr Acc kNothing = -static_cast<Acc>(__builtin_inff());
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < rows; r += kWarps) {
    const int p = w.position + (row0 + r) % static_cast<int>(a.S);
    const int last = min(w.end, p + 1);
    const int first = a.window > 0 ? max(w.begin, p + 1 - static_cast<int>(a.window)) : w.begin;
    Acc* scores = shared.scores[r] - w.run * kRun;
    Acc largest = kNothing;
    for (int key = w.begin + lane; key < w.end; key += kWarp) {
      Acc x = scores[key];
      if (a.softcap > 0) {
        const Acc cap = static_cast<Acc>(a.softcap);
        x = tanh_of(x / cap) * cap;
      }
      if (key < first || key >= last) x = kNothing;
      scores[key] = x;
      largest = max_of(largest, x);
    }
    largest = warp_reduce(largest, [](Acc x, Acc y) { return max_of(x, y); });
    Acc sum = 0;
    for (int key = w.begin + lane; key < w.end; key += kWarp) {
      // A key that is not seen adds nothing, also where none is and the largest is -inf.
      const Acc x = key < first || key >= last ? Acc(0) : softmax_exp(scores[key] - largest);
      scores[key] = x;
      sum += x;
    }
    sum = warp_reduce(sum, [](Acc x, Acc y) { return x + y; });
    if (lane == 0) {
      shared.max[r] = largest;
      shared.sum[r] = sum;
    }
  }
}

// f(row, d, sum over keys of p v) for each element of the rows' outputs. Threads take columns;
// where a head has fewer than there are threads, groups of them share the keys.
template <class C, class Acc, class F>
__device__ void add_values(const AttentionStepArgs& a, const StepWork& w, int rows,
                           StepShared<Acc>& shared, F f) {
  const int D = static_cast<int>(a.D);
  const int rank = static_cast<int>(threadIdx.x);
  const int width = min(kThreads, ceil_div(D, kWarp) * kWarp);
  const int groups = kThreads / width, group = rank / width;
  Acc sum[kColumns][kRows] = {};
  if (group < groups) {
    for (int key = w.begin + group; key < w.end; key += groups) {
      const C* v = head_at<C>(a.v_cache, a.v_cache_strides, w.b, w.head, key);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = rank % width + c * kThreads;
        if (d >= D) break;
        const Acc x = load1(v + d);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < rows) sum[c][r] += shared.scores[r][key - w.run * kRun] * x;
        }
      }
    }
  }
  if (groups == 1) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = rank + c * kThreads;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (d < D && r < rows) f(r, d, sum[c][r]);
      }
    }
    return;
  }
  // Only then is one column a thread's whole share, and all groups' sums fit where q was.
  Acc* of_group = &shared.q[0][0];
  if (group < groups) {
    for (int r = 0; r < rows; ++r) of_group[r * kThreads + rank] = sum[0][r];
  }
  __syncthreads();  // orders the groups' sums before they are read
  for (int i = rank; i < rows * D; i += kThreads) {
    const int r = i / D, d = i % D;
    Acc total = 0;
    for (int g = 0; g < groups; ++g) total += of_group[r * kThreads + g * width + d];
    f(r, d, total);
  }
}

// ---------------------------------------------------------------- the kernel

template <class T, class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    attention_step_kernel(const __grid_constant__ AttentionStepArgs a) {
  using Acc = AccOf<T>;
  const StepWork w = find_step(a);
  if (w.run >= w.runs) return;
  const int D = static_cast<int>(a.D), S = static_cast<int>(a.S);
  const int group = static_cast<int>(a.NH / a.NKV), all_rows = group * S;
  const int rank = static_cast<int>(threadIdx.x);
  StepShared<Acc>& shared = cuda::shared<StepShared<Acc>>();
  const int64_t slots = gridDim.x;  // runs that there is room for
  const int stride = D + 2;
  Acc* partials = static_cast<Acc*>(a.workspace) +
                  (static_cast<int64_t>(w.b) * a.NKV + w.head) * slots * all_rows * stride;
  const auto out_at = [&](int row) {
    return head_at<T>(a.out, a.out_strides, w.b, w.head * group + row / S, row % S);
  };

  append<T, C>(a, w);
  for (int row0 = 0; row0 < all_rows; row0 += kRows) {
    const int rows = min(kRows, all_rows - row0);
    // Orders the new keys and values, and the reads of the earlier rows, before what follows.
    __syncthreads();
    for (int i = rank; i < rows * D; i += kThreads) {
      const int row = row0 + i / D, d = i % D, s = row % S;
      const T* q = head_at<T>(a.q, a.q_strides, w.b, w.head * group + row / S, s);
      // A token that does not fit has no position; its output is not used.
      const int p = min(w.position + s, static_cast<int>(a.L) - 1);
      shared.q[i / D][d] = rotated<Acc>(a, q, d, p) * static_cast<Acc>(a.scale);
    }
    __syncthreads();  // orders q before the products
    make_scores<C>(a, w, rows, shared);
    __syncthreads();  // orders the warps' scores before each row's warp reads them
    softmax_rows(a, w, row0, rows, shared);
    __syncthreads();  // orders the rows' weights before every thread reads them
    add_values<C>(a, w, rows, shared, [&](int r, int d, Acc sum) {
      const int row = row0 + r;
      if (w.runs == 1) {
        const Acc out = row % S < w.tokens ? sum / shared.sum[r] : quiet_nan<Acc>();
        store1(out_at(row) + d, out);
      } else {
        partials[(static_cast<int64_t>(w.run) * all_rows + row) * stride + d] = sum;
      }
    });
    if (w.runs > 1 && rank < rows) {
      Acc* end = partials + (static_cast<int64_t>(w.run) * all_rows + row0 + rank) * stride + D;
      end[0] = shared.max[rank];
      end[1] = shared.sum[rank];
    }
  }
  if (w.runs == 1) return;

  // Each thread's partial results are visible on the device before the block counts itself.
  __threadfence();
  __syncthreads();  // orders all threads' fences before the count
  if (rank == 0) {
    int32_t* counter = a.counters + static_cast<int64_t>(w.b) * a.NKV + w.head;
    shared.last = atomicAdd(counter, 1) == w.runs - 1;
    if (shared.last) *counter = 0;  // as it was found, for the next call
  }
  __syncthreads();  // orders the count before every thread reads it
  if (!shared.last) return;
  __threadfence();  // orders the count before the reads of the other blocks' results
  for (int i = rank; i < all_rows * D; i += kThreads) {
    const int row = i / D, d = i % D;
    const Acc* of_row = partials + row * stride;
    const int64_t step = static_cast<int64_t>(all_rows) * stride;  // to the next run
    Acc largest = lowest<Acc>();
    for (int run = 0; run < w.runs; ++run) largest = max_of(largest, of_row[run * step + D]);
    Acc out = 0, sum = 0;
    for (int run = 0; run < w.runs; ++run) {
      const Acc* of_run = of_row + run * step;
      if (of_run[D + 1] == 0) continue;  // no key of it is seen
      const Acc factor = softmax_exp(of_run[D] - largest);
      out += of_run[d] * factor;
      sum += of_run[D + 1] * factor;
    }
    store1(out_at(row) + d, row % S < w.tokens ? out / sum : quiet_nan<Acc>());
  }
}

int64_t runs_of(const AttentionStepArgs& a) { return ceil_div<int64_t>(a.L, kRun); }

}  // namespace

int64_t attention_step_workspace(const AttentionStepArgs& a) {
  const int64_t item = a.dtype == DType::kFloat64 ? 8 : 4;
  return a.B * a.NKV * runs_of(a) * (a.NH / a.NKV) * a.S * (a.D + 2) * item;
}

void attention_step(const AttentionStepArgs& a, Stream stream) {
  constexpr int64_t kMostBlocks = 65535;  // along y and z
  if (a.B > kMostBlocks || a.NKV > kMostBlocks || a.L > INT_MAX - kRun) {
    throw_value_error(
        "attention_step: k_cache must be at most [65535, 65535, 2^31 - 257, D] on CUDA, got [" +
        std::to_string(a.B) + ", " + std::to_string(a.NKV) + ", " + std::to_string(a.L) + ", " +
        std::to_string(a.D) + "]");
  }
  const LaunchConfig config{.name = "attention_step",
                            .grid = dim3(static_cast<unsigned>(runs_of(a)),
                                         static_cast<unsigned>(a.NKV), static_cast<unsigned>(a.B)),
                            .block = kThreads,
                            .stream = stream};
  for_each_mixed("attention_step", [&](auto tag, auto cache_tag, const std::string&) {
    using T = typename decltype(tag)::type;
    using C = typename decltype(cache_tag)::type;
    if (a.dtype == dtype_of<T>() && a.cache_dtype == dtype_of<C>()) {
      launch(attention_step_kernel<T, C>, config, a);
    }
  });
}

void visit_attention_step_kernels(VisitKernel visit, void* context) {
  for_each_mixed("attention_step", [&](auto tag, auto cache_tag, const std::string& name) {
    using T = typename decltype(tag)::type;
    using C = typename decltype(cache_tag)::type;
    visit(context, name.c_str(), reinterpret_cast<const void*>(&attention_step_kernel<T, C>));
  });
}

}  // namespace seqkern::cuda
