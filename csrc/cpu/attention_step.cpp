// One step of attention with a cache: queries and cache are prepared, runs of keys attended to, and
// the runs' results combined. What bounds it is reading the cache, once per key head.
#include "cpu/attention_step_plan.h"
#include "cpu/attention_step_tile.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kMaxD = 256;

template <int kN>
struct Count {
  static constexpr int value = kN;
};

template <class T>
const T* at(const void* base, const HeadStrides& strides, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(base) + b * strides.b + h * strides.h + t * strides.t;
}

// ---------------------------------------------------------------- preparing queries and cache

// x [D] of the token at position p, rotated.
template <class T, class Acc>
void load_rotated(const AttentionStepArgs& a, const T* x, int64_t p, bool rotate, Acc* y) {
  for (int64_t d = 0; d < a.D; ++d) y[d] = static_cast<Acc>(load1(x + d));
  if (!a.cos || !rotate) return;
  const int64_t half = a.R / 2;
  const float* cos = a.cos + p * half;
  const float* sin = a.sin + p * half;
  for (int64_t i = 0; i < half; ++i) {
    Acc& first = y[a.interleaved ? 2 * i : i];
    Acc& second = y[a.interleaved ? 2 * i + 1 : i + half];
    const Acc c = static_cast<Acc>(cos[i]), s = static_cast<Acc>(sin[i]);
    const Acc turned = first * c - second * s;
    second = second * c + first * s;
    first = turned;
  }
}

// New tokens of row b and key head `head`: into the cache; and the queries of its group, scaled.
template <class T, class C>
void prepare(const AttentionStepArgs& a, const StepPlan& plan, int64_t b, int64_t head) {
  using Acc = AccOf<T>;
  Acc x[kMaxD];
  for (int64_t s = 0; s < a.S; ++s) {
    const int64_t p = a.positions[b] + s;
    const auto store_at = [&](void* cache, const HeadStrides& strides) {
      C* to = const_cast<C*>(at<C>(cache, strides, b, head, p));
      for (int64_t d = 0; d < a.D; ++d) store1(to + d, x[d]);
    };
    load_rotated(a, at<T>(a.k_new, a.k_new_strides, b, head, s), p, true, x);
    store_at(a.k_cache, a.k_cache_strides);
    load_rotated(a, at<T>(a.v_new, a.v_new_strides, b, head, s), p, false, x);
    store_at(a.v_cache, a.v_cache_strides);
  }
  for (int64_t row = 0; row < plan.rows; ++row) {
    const int64_t h = head * plan.group + row / a.S, s = row % a.S;
    Acc* q = static_cast<Acc*>(a.workspace) + ((b * a.NH + h) * a.S + s) * plan.stride;
    load_rotated(a, at<T>(a.q, a.q_strides, b, h, s), a.positions[b] + s, true, q);
    for (int64_t d = 0; d < a.D; ++d) q[d] *= static_cast<Acc>(a.scale);
    for (int64_t d = a.D; d < plan.stride; ++d) q[d] = 0;
  }
}

// ---------------------------------------------------------------- a run of keys

// Keys [tile, tile + n) that row r of R, from `row` of the group, does not see.
template <int R, class Acc>
void hide(const AttentionStepArgs& a, int64_t b, int64_t row, int64_t tile, int n, Acc* scores) {
  for (int r = 0; r < R; ++r) {
    const int64_t p = a.positions[b] + (row + r) % a.S;
    const int64_t seen = p + 1 - tile;  // the first key after those seen
    const int64_t hidden = a.window > 0 ? p + 1 - a.window - tile : 0;
    const int last = static_cast<int>(seen < 0 ? 0 : seen < n ? seen : n);
    const int first = static_cast<int>(hidden < 0 ? 0 : hidden < last ? hidden : last);
    for (int i = 0; i < first; ++i) scores[i * R + r] = -static_cast<Acc>(__builtin_inf());
    for (int i = last; i < n; ++i) scores[i * R + r] = -static_cast<Acc>(__builtin_inf());
  }
}

// R query rows, from `row` of the group, and the keys [begin, end) of one key head.
template <int R, class C>
void attend(const AttentionStepArgs& a, const StepPlan& plan, int64_t b, int64_t head, int64_t row,
            int64_t begin, int64_t end, AccOf<C>* partial) {
  using Acc = AccOf<C>;
  constexpr int L = kLanes<Acc>;
  const Acc* q = static_cast<const Acc*>(a.workspace) +
                 ((b * a.NH + head * plan.group) * a.S + row) * plan.stride;
  RowStates<R, Acc> state;
  alignas(64) Acc scores[R * kTile];
  for (int r = 0; r < R; ++r) {
    for (int64_t d = 0; d < plan.stride; ++d) partial[r * plan.partial + d] = 0;
  }
  const int64_t k_stride = a.k_cache_strides.t, v_stride = a.v_cache_strides.t;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int n = static_cast<int>(end - tile < kTile ? end - tile : kTile);
    const int count = (n * R + L - 1) / L * L;
    const C* k = at<C>(a.k_cache, a.k_cache_strides, b, head, tile);
    const C* v = at<C>(a.v_cache, a.v_cache_strides, b, head, tile);
    // K and V are read in turn, which no prefetcher foresees: each announces the other's next tile.
    // Rows after the first find both in the second-level cache.
    const C* v_ahead = row == 0 ? v : nullptr;
    const C* k_ahead = row == 0 ? k + kTile * k_stride : nullptr;
    make_scores<R>(q, plan.stride, k, k_stride, n, a.D, v_ahead, v_stride, scores);
    if (a.softcap > 0) {
      const Acc cap = static_cast<Acc>(a.softcap);
      for (int i = 0; i < count; i += L) store(scores + i, vtanh(load(scores + i) / cap) * cap);
    }
    for (int i = n * R; i < count; ++i) scores[i] = -static_cast<Acc>(__builtin_inf());
    if (a.window > 0 || tile + n > a.positions[b] + 1) hide<R>(a, b, row, tile, n, scores);
    softmax_tile<R>(scores, count, state, partial, plan.partial, a.D);
    add_values<R, kSums / R>(scores, v, v_stride, n, 0, a.D, k_ahead, k_stride, partial,
                             plan.partial);
  }
  for (int r = 0; r < R; ++r) {
    partial[r * plan.partial + plan.stride] = state.max[r];
    partial[r * plan.partial + plan.stride + 1] = state.row_sum(r);
  }
}

template <class C>
void attend_run(const AttentionStepArgs& a, const StepPlan& plan, int64_t b, int64_t head,
                int64_t run) {
  using Acc = AccOf<C>;
  const int64_t length = a.positions[b] + a.S;
  // The oldest key that the first new token sees.
  const int64_t oldest = a.window > 0 ? a.positions[b] + 1 - a.window : 0;
  const int64_t from = run * kStepRun, to = from + kStepRun;
  const int64_t begin = from > oldest ? from : oldest;
  const int64_t end = to < length ? to : length;
  Acc* partial = static_cast<Acc*>(a.workspace) + plan.queries +
                 ((b * a.NKV + head) * plan.runs + run) * plan.rows * plan.partial;
  int64_t row = 0;
  const auto rows = [&](auto count) {
    for (; row + count.value <= plan.rows; row += count.value) {
      attend<count.value, C>(a, plan, b, head, row, begin, end, partial + row * plan.partial);
    }
  };
  rows(Count<kMostRows<Acc>>{});
  rows(Count<2>{});
  rows(Count<1>{});
}

// ---------------------------------------------------------------- combining runs

template <class T>
void combine(const AttentionStepArgs& a, const StepPlan& plan, int64_t b, int64_t h) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const int64_t head = h / plan.group;
  alignas(64) Acc sum[kMaxD];
  for (int64_t s = 0; s < a.S; ++s) {
    const int64_t row = (h % plan.group) * a.S + s;
    const Acc* partial = static_cast<const Acc*>(a.workspace) + plan.queries +
                         (b * a.NKV + head) * plan.runs * plan.rows * plan.partial +
                         row * plan.partial;
    const int64_t step = plan.rows * plan.partial;  // to the next run
    Acc max = partial[plan.stride];
    for (int64_t run = 1; run < plan.runs; ++run) {
      const Acc m = partial[run * step + plan.stride];
      max = m > max ? m : max;
    }
    for (int64_t d = 0; d < plan.stride; ++d) sum[d] = 0;
    Acc total = 0;
    for (int64_t run = 0; run < plan.runs; ++run) {
      const Acc* of_run = partial + run * step;
      if (of_run[plan.stride + 1] == 0) continue;  // no key of it is seen
      const Acc factor = exp1(of_run[plan.stride] - max);
      total += of_run[plan.stride + 1] * factor;
      for (int64_t d = 0; d < a.D; d += L)
        store(sum + d, load(sum + d) + load(of_run + d) * factor);
    }
    T* out = const_cast<T*>(at<T>(a.out, a.out_strides, b, h, s));
    for (int64_t d = 0; d < a.D; ++d) store1(out + d, sum[d] / total);
  }
}

}  // namespace

// Tasks: (row of the batch, key head).
void attention_step_prepare(const AttentionStepArgs& a, int64_t begin, int64_t end) {
  const StepPlan plan(a);
  dispatch_mixed(a.dtype, a.cache_dtype, [&](auto tag, auto cache_tag) {
    using T = typename decltype(tag)::type;
    using C = typename decltype(cache_tag)::type;
    for (int64_t task = begin; task < end; ++task) {
      prepare<T, C>(a, plan, task / a.NKV, task % a.NKV);
    }
  });
}

// Tasks: (row of the batch, key head, run of keys).
void attention_step(const AttentionStepArgs& a, int64_t begin, int64_t end) {
  const StepPlan plan(a);
  dispatch_dtype(a.cache_dtype, [&](auto tag) {
    using C = typename decltype(tag)::type;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t run = task % plan.runs, head = task / plan.runs % a.NKV;
      attend_run<C>(a, plan, task / plan.runs / a.NKV, head, run);
    }
  });
}

// Tasks: (row of the batch, query head).
void attention_step_combine(const AttentionStepArgs& a, int64_t begin, int64_t end) {
  const StepPlan plan(a);
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t task = begin; task < end; ++task) combine<T>(a, plan, task / a.NH, task % a.NH);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
