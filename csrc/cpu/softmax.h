// Softmax of a row taken in blocks: staging, the online softmax, sums over target distributions.
#pragma once

#include <type_traits>

#include "cpu/part.h"
#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Elements per block: 2 KB of float staging, and a running-maximum update every 512 elements costs
// nothing beside their exponentials.
constexpr int64_t kBlock = 512;
constexpr int64_t kPrefetchAhead = 2 * kBlock;

template <class Acc>
constexpr Acc lowest() {
  return sizeof(Acc) == 4 ? static_cast<Acc>(-3.402823466e+38F)
                          : static_cast<Acc>(-1.7976931348623157e+308);
}

// ---------------------------------------------------------------- staging

// x[0, len) as Acc, capped, and padded with `pad` to whole vectors. Whole float blocks without a
// cap are used where they are. With a cap, its derivative goes to `derivative` unless that is null.
template <class T, class Acc, bool kCap>
SEQKERN_INLINE const Acc* stage(const T* x, int64_t len, Acc softcap, Acc pad, Acc* buffer,
                                Acc* derivative = nullptr) {
  constexpr int L = kLanes<Acc>;
  if constexpr (std::is_same_v<T, Acc> && !kCap) {
    if (len % L == 0) return x;
  }
  for (int64_t i = 0; i < len; i += L) {
    const int64_t valid = len - i;
    Vec<Acc> v = load_part<Acc>(x + i, valid, splat<Vec<Acc>>(pad));
    if constexpr (kCap) {
      const TanhResult<Vec<Acc>> t = tanh_with_derivative(v / softcap);
      v = t.value * softcap;
      if (derivative) store(derivative + i, t.derivative);
      for (int64_t j = valid; j < L; ++j) v[j] = pad;
    }
    store(buffer + i, v);
  }
  return buffer;
}

// ---------------------------------------------------------------- online softmax

// Running maximum m and sum of exp(x - m), the sum kept per lane until the row ends.
template <class Acc>
struct Online {
  Acc max = lowest<Acc>();
  Vec<Acc> sum = {};

  SEQKERN_INLINE Vec<Acc> block_max(const Acc* x, int64_t n) {
    constexpr int L = kLanes<Acc>;
    Vec<Acc> m0 = load(x), m1 = m0, m2 = m0, m3 = m0;
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
      m0 = vmax(m0, load(x + i));
      m1 = vmax(m1, load(x + i + L));
      m2 = vmax(m2, load(x + i + 2 * L));
      m3 = vmax(m3, load(x + i + 3 * L));
    }
    for (; i < n; i += L) m0 = vmax(m0, load(x + i));
    return vmax(vmax(m0, m1), vmax(m2, m3));
  }

  // x: n elements (whole vectors), padded with -inf.
  void add(const Acc* x, int64_t n) {
    raise_max(x, n);
    add_exponentials(x, n);
  }

  __attribute__((always_inline)) inline void raise_max(const Acc* x, int64_t n) {
    const Acc m = hmax(block_max(x, n));
    if (m > max) {
      if (max > lowest<Acc>()) sum *= exp1(max - m);  // nothing to rescale before the first block
      max = m;
    }
  }

  // After raise_max of the same elements.
  __attribute__((always_inline)) inline void add_exponentials(const Acc* x, int64_t n) {
    constexpr int L = kLanes<Acc>;
    const Vec<Acc> shift = splat<Vec<Acc>>(max);
    Vec<Acc> s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
      // The next blocks' lines, so that memory works while this block's exponentials are computed.
      __builtin_prefetch(x + i + kPrefetchAhead);
      __builtin_prefetch(x + i + kPrefetchAhead + 2 * L);
      s0 += exp_nonpositive<Acc>(load(x + i) - shift);
      s1 += exp_nonpositive<Acc>(load(x + i + L) - shift);
      s2 += exp_nonpositive<Acc>(load(x + i + 2 * L) - shift);
      s3 += exp_nonpositive<Acc>(load(x + i + 3 * L) - shift);
    }
    for (; i < n; i += L) s0 += exp_nonpositive<Acc>(load(x + i) - shift);
    sum += (s0 + s1) + (s2 + s3);
  }

  Acc log_sum() const { return log1(hsum(sum)); }
};

// ---------------------------------------------------------------- target sums

// Sums over a row of w_v q_v and w_v q_v (x_v - shift). The shift keeps the second sum from
// cancelling against lse * (the first) when all logits are far from zero.
template <class Acc>
struct TargetSums {
  Acc mass = 0;
  Acc logits = 0;
  Acc shift = 0;
};

// q is uniform (1) for label smoothing of class indices, or the probabilities p with smoothing
// mixed in.
template <class Acc>
SEQKERN_INLINE void add_targets(TargetSums<Acc>& sums, const Acc* x, const Acc* p,
                                const Acc* weight, Acc keep, Acc uniform, int64_t len) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> mass = {}, logits = {};
  int64_t i = 0;
  for (; i + L <= len; i += L) {
    Vec<Acc> q = splat<Vec<Acc>>(uniform);
    if (p) q += load(p + i) * keep;
    if (weight) q *= load(weight + i);
    mass += q;
    logits += q * (load(x + i) - sums.shift);
  }
  sums.mass += hsum(mass);
  sums.logits += hsum(logits);
  for (; i < len; ++i) {
    const Acc q = (uniform + (p ? p[i] * keep : Acc(0))) * (weight ? weight[i] : Acc(1));
    sums.mass += q;
    sums.logits += q * (x[i] - sums.shift);
  }
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
