// One step of attention with a cache: queries and cache are prepared, runs of keys attended to, and
// the runs' results combined. What bounds it is reading the cache, once per key head.
#include "cpu/attention_step_plan.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kTile = 32;   // keys whose scores are made before they are used: K, then V, of these
constexpr int kAhead = 16;  // keys by which their reads are announced
constexpr int kRows = 4;    // query rows at a time, so many products share a load of the cache
// Keys at a time: kRows times so many sums, beside the loads, fill the registers.
constexpr int kKeys = kVectorBytes == 64 ? 4 : 2;
constexpr int kMaxD = 256;

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

// ---------------------------------------------------------------- products with a tile of keys

// Elements [d, D) of a head, less than a vector, and zeros.
template <class C>
SEQKERN_INLINE Vec<AccOf<C>> load_last(const C* x, int64_t d, int64_t D) {
  Vec<AccOf<C>> v = {};
  for (int64_t i = 0; d + i < D; ++i) v[i] = load1(x + d + i);
  return v;
}

// scores[r][key] = q_r . k_key for kN keys and R rows.
template <int kN, int R, class C, class Acc>
SEQKERN_INLINE void dots(const Acc* q, int64_t q_stride, const C* k, int64_t k_stride, int64_t D,
                         Acc* scores) {
  Vec<Acc> sum[R][kN];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sum[r][n] = Vec<Acc>{};
  }
  const auto add = [&](int64_t d, const Vec<Acc>(&key)[kN]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<Acc> query = load(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) sum[r][n] += query * key[n];
    }
  };
  Vec<Acc> key[kN];
  int64_t d = 0;
  for (; d + kLanes<Acc> <= D; d += kLanes<Acc>) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) key[n] = load(k + n * k_stride + d);
    add(d, key);
  }
  if (d < D) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) key[n] = load_last(k + n * k_stride, d, D);
    add(d, key);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) scores[r * kTile + n] = hsum(sum[r][n]);
  }
}

// out_r += sum_key p[r][key] v_key for n keys, over kColumns vectors from d, which stay in
// registers; a last vector that the head does not fill is read as far as it goes.
template <int R, int kColumns, bool kWhole, class C, class Acc>
SEQKERN_INLINE void add_columns(const Acc* p, const C* v, int64_t v_stride, int n, int64_t d,
                                int64_t D, Acc* out, int64_t out_stride) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> sum[R][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) sum[r][c] = load(out + r * out_stride + d + c * L);
  }
  for (int key = 0; key < n; ++key) {
    Vec<Acc> value[kColumns];
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) {
      const C* from = v + key * v_stride;
      if constexpr (kWhole) {
        value[c] = load(from + d + c * L);
      } else {
        value[c] = load_last(from, d + c * L, D);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<Acc> weight = splat<Vec<Acc>>(p[r * kTile + key]);
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) sum[r][c] += weight * value[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) store(out + r * out_stride + d + c * L, sum[r][c]);
  }
}

template <int R, class C, class Acc>
SEQKERN_INLINE void add_values(const Acc* p, const C* v, int64_t v_stride, int n, int64_t D,
                               Acc* out, int64_t out_stride) {
  constexpr int L = kLanes<Acc>;
  int64_t d = 0;
  for (; d + 2 * L <= D; d += 2 * L) {
    add_columns<R, 2, true>(p, v, v_stride, n, d, D, out, out_stride);
  }
  if (d + L <= D) {
    add_columns<R, 1, true>(p, v, v_stride, n, d, D, out, out_stride);
    d += L;
  }
  if (d < D) add_columns<R, 1, false>(p, v, v_stride, n, d, D, out, out_stride);
}

template <class C>
SEQKERN_INLINE void prefetch_head(const C* x, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(C);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(x + d);
}

// f(Count<kN>, first key) over keys [0, n), kAtOnce at a time.
template <int kN>
struct Count {
  static constexpr int value = kN;
};
template <int kAtOnce, class F>
SEQKERN_INLINE void for_keys(int n, F f) {
  int key = 0;
  for (; key + kAtOnce <= n; key += kAtOnce) f(Count<kAtOnce>{}, key);
  for (; key < n; ++key) f(Count<1>{}, key);
}

// ---------------------------------------------------------------- softmax over a tile

template <class Acc>
struct RunState {
  Acc max = -static_cast<Acc>(__builtin_inf());
  Acc sum = 0;
};

// Turns a row's scores of n keys into exp(x - max), and its output to the new maximum. Keys outside
// [first, last) are not seen. Whole vectors of scores are written.
template <class Acc>
void softmax_tile(Acc* scores, int n, int first, int last, double softcap, RunState<Acc>& state,
                  Acc* out, int64_t D) {
  constexpr int L = kLanes<Acc>;
  constexpr Acc kMinusInfinity = -static_cast<Acc>(__builtin_inf());
  if (softcap > 0) {
    const Acc cap = static_cast<Acc>(softcap);
    for (int i = n; i % L != 0; ++i) scores[i] = 0;
    for (int i = 0; i < n; i += L) {
      store(scores + i, tanh_with_derivative(load(scores + i) / cap).value * cap);
    }
  }
  for (int i = n; i % L != 0; ++i) scores[i] = kMinusInfinity;
  for (int i = 0; i < first; ++i) scores[i] = kMinusInfinity;
  for (int i = last; i < n; ++i) scores[i] = kMinusInfinity;
  Vec<Acc> largest = load(scores);
  for (int i = L; i < n; i += L) largest = vmax(load(scores + i), largest);
  const Acc max = hmax(largest);
  if (max > state.max) {
    const Acc factor = state.sum == 0 ? Acc(0) : exp1(state.max - max);
    state.sum *= factor;
    for (int64_t d = 0; d < D; d += L) store(out + d, load(out + d) * factor);
    state.max = max;
  }
  Vec<Acc> sum = {};
  const Vec<Acc> shift = splat<Vec<Acc>>(state.max);
  for (int i = 0; i < n; i += L) {
    const Vec<Acc> p = exp_nonpositive<Acc>(load(scores + i) - shift);
    store(scores + i, p);
    sum += p;
  }
  state.sum += hsum(sum);
}

// ---------------------------------------------------------------- a run of keys

// R query rows, from `row` of the group, and the keys [begin, end) of one key head.
template <int R, class C>
void attend(const AttentionStepArgs& a, const StepPlan& plan, int64_t b, int64_t head, int64_t row,
            int64_t begin, int64_t end, AccOf<C>* partial) {
  using Acc = AccOf<C>;
  const Acc* q = static_cast<const Acc*>(a.workspace) +
                 ((b * a.NH + head * plan.group) * a.S + row) * plan.stride;
  RunState<Acc> state[R];
  alignas(64) Acc scores[R * kTile];
  for (int r = 0; r < R; ++r) {
    for (int64_t d = 0; d < plan.stride; ++d) partial[r * plan.partial + d] = 0;
  }
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int n = static_cast<int>(end - tile < kTile ? end - tile : kTile);
    const C* k = at<C>(a.k_cache, a.k_cache_strides, b, head, tile);
    const C* v = at<C>(a.v_cache, a.v_cache_strides, b, head, tile);
    const int64_t k_stride = a.k_cache_strides.t, v_stride = a.v_cache_strides.t;
    for_keys<R == kRows ? kKeys : 4>(n, [&](auto keys, int key) __attribute__((always_inline)) {
      // Values are read next, a few columns of all keys at a time, which no prefetcher foresees.
      if (row == 0) {
        for (int i = 0; i < keys.value; ++i) {
          prefetch_head(k + (key + i + kAhead) * k_stride, a.D);
          prefetch_head(v + (key + i) * v_stride, a.D);
        }
      }
      dots<keys.value, R>(q, plan.stride, k + key * k_stride, k_stride, a.D, scores + key);
    });
    for (int r = 0; r < R; ++r) {
      const int64_t p = a.positions[b] + (row + r) % a.S;
      const int64_t seen = p + 1 - tile;  // the first key after those seen
      const int64_t hidden = a.window > 0 ? p + 1 - a.window - tile : 0;
      const int last = static_cast<int>(seen < 0 ? 0 : seen < n ? seen : n);
      const int first = static_cast<int>(hidden < 0 ? 0 : hidden < last ? hidden : last);
      if (first == last) {
        for (int i = 0; i < n; ++i) scores[r * kTile + i] = 0;
        continue;
      }
      softmax_tile(scores + r * kTile, n, first, last, a.softcap, state[r],
                   partial + r * plan.partial, a.D);
    }
    add_values<R>(scores, v, v_stride, n, a.D, partial, plan.partial);
  }
  for (int r = 0; r < R; ++r) {
    partial[r * plan.partial + plan.stride] = state[r].max;
    partial[r * plan.partial + plan.stride + 1] = state[r].sum;
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
  rows(Count<kRows>{});
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

// The cache's element type is T's own, or a 16-bit one.
template <class F>
void dispatch_cache(const AttentionStepArgs& a, F f) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>) {
      if (a.cache_dtype == DType::kBFloat16) return f(tag, TypeTag<BFloat16>{});
      if (a.cache_dtype == DType::kFloat16) return f(tag, TypeTag<Half>{});
    }
    f(tag, tag);
  });
}

}  // namespace

// Tasks: (row of the batch, key head).
void attention_step_prepare(const AttentionStepArgs& a, int64_t begin, int64_t end) {
  const StepPlan plan(a);
  dispatch_cache(a, [&](auto tag, auto cache_tag) {
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
