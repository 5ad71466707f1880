// One step of attention with a cache, in one launch: a block takes a run of keys of one key head
// for all query rows that share it, tile by tile, and the last block of a row to finish combines
// the runs in order. Layout and reasons: docs/math/attention_step.md.
#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/attention_step_mma.cuh"
#include "cuda/attention_step_runs.cuh"
#include "cuda/attention_step_tile.cuh"
#include "cuda/attention_step_tokens.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/mixed.cuh"

namespace seqkern::cuda {
namespace {

// Said so that the compiler uses the registers this leaves, and no more. With 64 sums a thread,
// two blocks would leave too few.
template <int sums>
inline constexpr int kBlocksPerMultiprocessor = sums < 64 ? 2 : 1;

template <class Acc, int R>
struct StepShared {
  Acc max_of_warp[R][kStepWarps], sum_of_warp[R][kStepWarps];  // of a tile
  Acc max[R], sum[R];                                          // of the tiles so far
  Acc next_max[R], factor[R];                                  // with this tile; old sums' factor
  int last;                                                    // whether this block combines
};

// ---------------------------------------------------------------- the kernel

// Dynamic shared memory.
template <class C, class Acc, int R>
struct StepLayout {
  int k, v, q, p, bytes;  // offsets in bytes

  __host__ __device__ explicit StepLayout(const StepTile& tile) {
    constexpr int kItem = sizeof(Acc);
    const int of_k = tile.keys * tile.k_stride * 16, of_v = tile.keys * tile.packs * 16;
    // The sums of the groups of threads take the place of the tile, and so do the runs' factors.
    const int sums = kStepThreads * R * kPack<C> * kItem, factors = R * kMostRuns * kItem;
    int tiles = of_k + of_v;
    if (tiles < sums) tiles = sums;
    if (tiles < factors) tiles = factors;
    k = 0;
    v = of_k;
    q = tiles;
    p = q + tile.packs * q_stride<C, Acc>(R) * kItem;
    bytes = p + tile.keys * R * kItem;
  }
};

template <class T, class C, int R>
__global__ void __launch_bounds__(kStepThreads, kBlocksPerMultiprocessor<R * kPack<C>>)
    attention_step_kernel(const __grid_constant__ AttentionStepArgs a) {
  using Acc = AccOf<T>;
  constexpr int P = kPack<C>;
  constexpr Acc kNothing = -static_cast<Acc>(__builtin_inff());
  const StepWork w = find_step(a);
  if (w.run >= w.runs) return;
  const int D = static_cast<int>(a.D), S = static_cast<int>(a.S);
  const int group = static_cast<int>(a.NH / a.NKV), all_rows = group * S;
  const int rank = static_cast<int>(threadIdx.x);
  const StepTile tile = step_tile<C>(D);
  const StepLayout<C, Acc, R> layout(tile);
  StepShared<Acc, R>& shared = cuda::shared<StepShared<Acc, R>>();
  char* memory = dynamic_shared<char>();
  C* k = reinterpret_cast<C*>(memory + layout.k);
  C* v = reinterpret_cast<C*>(memory + layout.v);
  Acc* q = reinterpret_cast<Acc*>(memory + layout.q);
  Acc* p = reinterpret_cast<Acc*>(memory + layout.p);
  const StepSource<C> keys = step_source<C>(a.k_cache, a.k_cache_strides, w.b, w.head, D);
  const StepSource<C> values = step_source<C>(a.v_cache, a.v_cache_strides, w.b, w.head, D);
  const auto copy_k = [&](int first, int from, int end) {
    copy_keys(keys, tile, D, first, from, min(end, tile.keys), k, tile.k_stride);
    cp_async_commit();
  };
  const auto copy_v = [&](int first, int from, int end) {
    copy_keys(values, tile, D, first, from, min(end, tile.keys), v, tile.packs);
    cp_async_commit();
  };
  const auto out_at = [&](int row) {
    return head_at<T>(a.out, a.out_strides, w.b, w.head * group + row / S, row % S);
  };
  const StepKey at = step_key(tile);

  for (int row0 = 0; row0 < all_rows; row0 += R) {
    const int rows = min(R, all_rows - row0);
    if (row0 > 0) __syncthreads();  // orders the reads of the earlier rows before what follows
    const bool appends = row0 == 0 && w.end > w.position;
    // Opaque: or it takes a register from one row to the next.
    int from = 0, end = (appends ? max(w.position, opaque(w.begin)) : w.end) - w.begin;
#pragma unroll 1
    while (true) {
      copy_k(w.begin, from, end);
      copy_v(w.begin, from, end);
      if (end == w.end - w.begin) break;
      append<T, C>(a, w);
      __syncthreads();  // orders the new keys and values before their copies
      from = end;
      end = w.end - w.begin;
    }
    const int width = tile.packs * P;
    for (int i = rank; i < R * width; i += kStepThreads) {
      const int r = i / width, d = i % width, row = row0 + r, s = row % S;
      // A token that does not fit has no position; its output is not used.
      const int position = min(w.position + s, static_cast<int>(a.L) - 1);
      Acc x = 0;
      if (r < rows && d < D) {
        const T* q_row = head_at<T>(a.q, a.q_strides, w.b, w.head * group + row / S, s);
        x = rotated<Acc>(a, q_row, d, position) * static_cast<Acc>(a.scale);
      }
      q[d / P * q_stride<C, Acc>(R) + r * P + d % P] = x;
    }

    Acc out[R][P] = {};
    if (rank < R) {
      shared.max[rank] = kNothing;
      shared.sum[rank] = 0;
    }
#pragma unroll 1
    for (int first = w.begin; first < w.end; first += tile.keys) {
      const int count = min(tile.keys, w.end - first);
      // The first tile's values are also under way, later ones' follow when their place is free.
      if (first == w.begin) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();  // orders q and K before the products, the last products before this V
      if (first > w.begin) copy_v(first, 0, count);

      Acc x[R];
      scores_of<R>(tile, at, count, k, q, x);
      unsigned seen = 0;  // rows that see the key
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (a.softcap > 0) {
          const Acc cap = static_cast<Acc>(a.softcap);
          x[r] = tanh_of(x[r] / cap) * cap;
        }
        const int distance = w.position + (S > 1 ? (row0 + r) % S : 0) - (first + at.key);
        const bool sees = at.key < count && distance >= 0 && (a.window == 0 || distance < a.window);
        seen |= unsigned{sees} << r;
        if (!sees) x[r] = kNothing;
      }
      Acc of_warp;
      int row = spread_reduce(x, [](Acc y, Acc z) { return max_of(y, z); }, of_warp);
      if (rank % kWarp < R) shared.max_of_warp[row][rank / kWarp] = of_warp;
      __syncthreads();  // orders the largest scores before their reads, K's before the next K
      const int next = min(first + tile.keys, w.end);
      copy_k(next, 0, w.end - next);

      Acc largest[R], factor[R];
      largest_of_warps(shared.max_of_warp, largest);
      bool grew = false;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Acc before = shared.max[r];
        largest[r] = max_of(before, largest[r]);
        // Of the same infinity there is no difference.
        factor[r] = before == largest[r] ? Acc(1) : softmax_exp(before - largest[r]);
        grew |= before != largest[r];
        if (rank == 0) {
          shared.next_max[r] = largest[r];
          shared.factor[r] = factor[r];
        }
        // A key that is not seen adds nothing, also where none is and the largest is -inf.
        x[r] = seen >> r & 1 ? softmax_exp(x[r] - largest[r]) : Acc(0);
      }
      if (at.part == 0) store_shared(p + at.key * R, x);
      if (grew) {  // all threads alike
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int i = 0; i < P; ++i) out[r][i] *= factor[r];
        }
      }
      // The threads of a key have the same; one of them counts.
#pragma unroll
      for (int r = 0; r < R; ++r) x[r] = at.part == 0 ? x[r] : Acc(0);
      row = spread_reduce(x, [](Acc y, Acc z) { return y + z; }, of_warp);
      if (rank % kWarp < R) shared.sum_of_warp[row][rank / kWarp] = of_warp;
      cp_async_wait<1>();
      __syncthreads();  // orders the weights, the warps' sums and V before their reads
      if (rank < R) {
        Acc sum = shared.sum[rank] * shared.factor[rank];
#pragma unroll
        for (int warp = 0; warp < kStepWarps; ++warp) sum += shared.sum_of_warp[rank][warp];
        shared.sum[rank] = sum;
        shared.max[rank] = shared.next_max[rank];
      }
      add_values<R>(tile, count, v, p, out);
    }

    __syncthreads();  // orders the reads of the tile before the sums that take its place
    Acc* of_group = reinterpret_cast<Acc*>(memory);
    const int pack = rank % tile.lanes, groups = kStepThreads / tile.lanes;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (pack < tile.packs) {
        store_shared(of_group + (rank / tile.lanes * R + r) * width + pack * P, out[r]);
      }
    }
    __syncthreads();  // orders the groups' sums before they are read
    const StepPartials<Acc> partials = step_partials<Acc>(a, w, width);
    for (int i = rank; i < rows * D; i += kStepThreads) {
      const int r = i / D, d = i % D, row = row0 + r;
      Acc total = 0;
#pragma unroll 8
      for (int g = 0; g < groups; ++g) total += of_group[(g * R + r) * width + d];
      if (w.runs == 1) {
        store1(out_at(row) + d, row % S < w.tokens ? total / shared.sum[r] : quiet_nan<Acc>());
      } else {
        partials.outs[(w.run * partials.rows + row) * partials.width + d] = total;
      }
    }
    if (w.runs > 1 && rank < rows) {
      Acc* end = partials.ends + (w.run * partials.rows + row0 + rank) * 2;
      end[0] = shared.max[rank];
      end[1] = shared.sum[rank];
    }
  }
  if (w.runs == 1 || !ends_row(a, w, shared.last)) return;
  combine_rows<R>(a, w, step_partials<Acc>(a, w, tile.packs * P),
                  reinterpret_cast<Acc(*)[kMostRuns]>(memory), [&](int row, int d, Acc x) {
                    store1(out_at(row) + d, row % S < w.tokens ? x : quiet_nan<Acc>());
                  });
}

// f(TypeTag<T>, TypeTag<C>, a constant R, name) for each kernel; R query rows at a time.
template <class F>
void for_each_step(F&& f) {
  for_each_mixed("attention_step", [&](auto tag, auto cache_tag, const std::string& name) {
    const auto call = [&](auto rows) {
      f(tag, cache_tag, rows, name + " rows " + std::to_string(rows));
    };
    call(std::integral_constant<int, 1>{});
    call(std::integral_constant<int, 4>{});
    call(std::integral_constant<int, 8>{});
  });
}

}  // namespace

int64_t attention_step_workspace(const AttentionStepArgs& a) {
  const int64_t item = a.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t width = ceil_div<int64_t>(a.D, 16) * 16;  // at most: of the matrix units' products
  return a.B * a.NKV * step_runs_of(a) * (a.NH / a.NKV) * a.S * (width + 2) * item;
}

void attention_step(const AttentionStepArgs& a, Stream stream) {
  constexpr int64_t kMostBlocks = 65535;  // along y and z
  if (a.B > kMostBlocks || a.NKV > kMostBlocks || a.L > INT_MAX - kRun) {
    throw_value_error(
        "attention_step: k_cache must be at most [65535, 65535, 2^31 - 129, D] on CUDA, got [" +
        std::to_string(a.B) + ", " + std::to_string(a.NKV) + ", " + std::to_string(a.L) + ", " +
        std::to_string(a.D) + "]");
  }
  if (attention_step_takes_mma(a)) return attention_step_mma(a, stream);
  const int64_t all_rows = a.NH / a.NKV * a.S;
  for_each_step([&](auto tag, auto cache_tag, auto rows, const std::string&) {
    using T = typename decltype(tag)::type;
    using C = typename decltype(cache_tag)::type;
    constexpr int R = decltype(rows)::value;
    if (a.dtype != dtype_of<T>() || a.cache_dtype != dtype_of<C>()) return;
    if (R != (all_rows == 1 ? 1 : all_rows <= 4 ? 4 : 8)) return;
    const StepLayout<C, AccOf<T>, R> layout(step_tile<C>(static_cast<int>(a.D)));
    launch(attention_step_kernel<T, C, R>,
           {.name = "attention_step",
            .grid = step_grid(a),
            .block = kStepThreads,
            .smem = static_cast<unsigned>(layout.bytes),
            .stream = stream},
           a);
  });
}

void visit_attention_step_kernels(VisitKernel visit, void* context) {
  for_each_step([&](auto tag, auto cache_tag, auto rows, const std::string& name) {
    using T = typename decltype(tag)::type;
    using C = typename decltype(cache_tag)::type;
    constexpr int R = decltype(rows)::value;
    visit(context, name.c_str(), reinterpret_cast<const void*>(&attention_step_kernel<T, C, R>));
  });
  visit_attention_step_mma_kernels(visit, context);
}

}  // namespace seqkern::cuda
