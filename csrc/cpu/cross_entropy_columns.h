// Rows of a softmax-cross-entropy side by side: a lane of a vector is a row, and a step down the
// classes leads to the next line of memory. Nothing is summed across lanes.
#pragma once

#include "cpu/cross_entropy.h"
#include "cpu/packing.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

inline constexpr int kMostVectors = 4;  // of rows at a time: a cache line each in float
// Classes whose logits stay in first-level cache between their maximum and their exponentials.
inline constexpr int64_t kClasses = 64;

// NV vectors of rows from n on, `count` of them, which lie in one batch.
template <class T, int NV>
struct Columns {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;

  const CrossEntropyInputs& in;
  const Options<Acc> o;
  int64_t n, count;
  int64_t class_stride;
  const T* x;
  const T* p = nullptr;
  Acc keep = 0, uniform = 0;

  Columns(const CrossEntropyInputs& in, int64_t n, int64_t count)
      : in(in),
        o(in),
        n(n),
        count(count),
        class_stride(in.logits_columns.class_stride),
        x(at(in.logits, in.logits_columns)),
        p(in.target_probs ? at(in.target_probs, in.target_probs_columns) : nullptr),
        keep(p ? Acc(1) - o.smoothing : Acc(0)),
        uniform(o.smoothing / static_cast<Acc>(in.V)) {}

  // Rows that were copied to x.
  Columns(const CrossEntropyInputs& in, int64_t n, int64_t count, const T* x, int64_t class_stride)
      : in(in), o(in), n(n), count(count), class_stride(class_stride), x(x) {}

  const T* at(const void* base, const ClassColumns& c) const {
    return static_cast<const T*>(base) + n / in.side * c.batch_stride + n % in.side;
  }

  // Rows of vector u that exist.
  int64_t lanes(int u) const { return count - u * L < L ? count - u * L : L; }
  bool whole() const { return count == NV * L; }

  template <bool kWhole>
  SEQKERN_INLINE V load_lanes(const T* from, int64_t lanes) {
    return kWhole ? load(from) : load_part<Acc>(from, lanes);
  }
  template <bool kWhole>
  __attribute__((always_inline)) V raw(int64_t v, int u) const {
    return load_lanes<kWhole>(x + v * class_stride + u * L, lanes(u));
  }
  __attribute__((always_inline)) V capped(V raw, V* derivative = nullptr) const {
    const TanhResult<V> t = tanh_with_derivative(raw / o.softcap);
    if (derivative) *derivative = t.derivative;
    return in_register(t.value * o.softcap);
  }
  template <bool kWhole, bool kOptions>
  __attribute__((always_inline)) V logit(int64_t v, int u) const {
    const V value = raw<kWhole>(v, u);
    return kOptions && o.softcap > 0 ? capped(value) : value;
  }
  // w_v q_v of a target distribution: uniform for label smoothing, or probabilities.
  template <bool kWhole>
  __attribute__((always_inline)) V target(int64_t v, int u) const {
    V q = splat<V>(uniform);
    if (p) {
      const T* from = p + v * in.target_probs_columns.class_stride + u * L;
      q += load_lanes<kWhole>(from, lanes(u)) * keep;
    }
    return in_register(o.weight ? q * o.weight[v] : q);
  }

  // The rows' classes as numbers; -1 where there is none.
  template <bool kWhole>
  __attribute__((always_inline)) void classes(V* y) const {
    alignas(64) Acc lanes[NV * L];
    if (!kWhole) __builtin_memset(lanes, 0xff, sizeof(lanes));  // NaN, which no class is
    const int64_t rows = kWhole ? NV * L : count;
    for (int64_t i = 0; i < rows; ++i) {
      // All ones for ignore_index, in arithmetic that every processor has vectors for.
      const uint64_t t = static_cast<uint64_t>(in.target[n + i]);
      const uint64_t other = t ^ static_cast<uint64_t>(in.ignore_index);
      const uint64_t none = ((other | -other) >> 63) - 1;
      lanes[i] = static_cast<Acc>(static_cast<int32_t>(t | none));
    }
    for (int u = 0; u < NV; ++u) y[u] = load(lanes + u * L);
  }

  // The logits of the rows' classes; 0 where there is none.
  void of_classes(Acc* x_y, Acc* derivative) const {
    alignas(64) Acc raw_y[NV * L] = {};
    for (int64_t i = 0; in.target && i < count; ++i) {
      const int64_t y = in.target[n + i];
      if (y != in.ignore_index) raw_y[i] = load1(x + y * class_stride + i);
    }
    for (int u = 0; u < NV; ++u) {
      V value = load(raw_y + u * L), d = splat<V>(Acc(1));
      if (o.softcap > 0) value = capped(value, &d);
      store(x_y + u * L, value);
      if (derivative) store(derivative + u * L, d);
    }
  }
};

// Calls f(Columns<T, NV>) for rows [begin, end), four vectors of a batch at a time, then one.
template <class T, class F>
SEQKERN_INLINE void for_columns(const CrossEntropyInputs& in, int64_t begin, int64_t end, F&& f) {
  constexpr int64_t L = kLanes<AccOf<T>>;
  for (int64_t n = begin; n < end;) {
    const int64_t left = in.side - n % in.side, rest = left < end - n ? left : end - n;
    if (rest >= kMostVectors * L) {
      f(Columns<T, kMostVectors>(in, n, kMostVectors * L));
      n += kMostVectors * L;
    } else {
      const int64_t count = rest < L ? rest : L;
      f(Columns<T, 1>(in, n, count));
      n += count;
    }
  }
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
