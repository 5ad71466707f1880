// Softmax-cross-entropy on the CPU: one pass over a row in blocks that stay in L1, so that the
// logits are read from memory once forward and once backward.
#include "ops/cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/simd.h"
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
    Vec<Acc> v = splat<Vec<Acc>>(pad);
    if (valid >= L) {
      v = load(x + i);
    } else {
      for (int64_t j = 0; j < valid; ++j) v[j] = load1(x + i + j);
    }
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

  static Vec<Acc> block_max(const Acc* x, int64_t n) {
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
    constexpr int L = kLanes<Acc>;
    const Acc m = hmax(block_max(x, n));
    if (m > max) {
      sum *= exp1(max - m);
      max = m;
    }
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

// ---------------------------------------------------------------- forward

template <class Acc>
struct Options {
  explicit Options(const CrossEntropyInputs& in)
      : weight(static_cast<const Acc*>(in.weight)),
        weight_sum(in.weight_sum ? *static_cast<const Acc*>(in.weight_sum) : Acc(in.V)),
        smoothing(static_cast<Acc>(in.label_smoothing)),
        softcap(static_cast<Acc>(in.softcap)),
        z_loss(static_cast<Acc>(in.z_loss)) {}
  const Acc* weight;  // [V] or null
  Acc weight_sum;
  Acc smoothing;
  Acc softcap;
  Acc z_loss;

  Acc weight_of(int64_t v) const { return weight ? weight[v] : Acc(1); }
};

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

template <class T, bool kCap, bool kTargetSums>
void forward_rows(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  const Options<Acc> o(in);
  const T* logits = static_cast<const T*>(in.logits);
  const T* probs = static_cast<const T*>(in.target_probs);
  Acc* row_loss = static_cast<Acc*>(a.row_loss);
  Acc* lse = static_cast<Acc*>(a.lse);
  Acc* row_max = static_cast<Acc*>(a.row_max);
  Acc* row_log_sum = static_cast<Acc*>(a.row_log_sum);
  alignas(64) Acc x_buffer[kBlock];
  alignas(64) Acc p_buffer[kBlock];
  const Acc keep = probs ? Acc(1) - o.smoothing : Acc(0);
  const Acc uniform = o.smoothing / static_cast<Acc>(in.V);

  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = in.target ? in.target[n] : 0;
    const bool ignored = in.target && y == in.ignore_index;
    if (ignored && !lse) {
      row_loss[n] = row_max[n] = row_log_sum[n] = 0;
      continue;
    }
    const T* x_n = logits + in.logits_rows.offset(n);
    const T* p_n = probs ? probs + in.target_probs_rows.offset(n) : nullptr;
    Online<Acc> online;
    TargetSums<Acc> sums;
    Acc x_y = 0;
    for (int64_t v = 0; v < in.V; v += kBlock) {
      const int64_t len = in.V - v < kBlock ? in.V - v : kBlock;
      const Acc* x = stage<T, Acc, kCap>(x_n + v, len, o.softcap,
                                         -static_cast<Acc>(__builtin_inf()), x_buffer);
      // Taken from the staged block, not capped anew: the same bits as in the sum.
      if (y >= v && y < v + len) x_y = x[y - v];
      online.add(x, (len + L - 1) / L * L);
      if constexpr (kTargetSums) {
        if (v == 0) sums.shift = online.max;
        const Acc* p = p_n ? stage<T, Acc, false>(p_n + v, len, Acc(0), Acc(0), p_buffer) : nullptr;
        add_targets(sums, x, p, o.weight ? o.weight + v : nullptr, keep, uniform, len);
      }
    }
    const Acc m = row_max[n] = online.max;
    const Acc log_sum = row_log_sum[n] = online.log_sum();
    if (lse) lse[n] = m + log_sum;
    Acc loss = 0;
    if (!ignored) {
      if (in.target) {
        loss = (Acc(1) - o.smoothing) * o.weight_of(y) * (log_sum + (m - x_y));
      }
      if constexpr (kTargetSums) loss += sums.mass * (log_sum + (m - sums.shift)) - sums.logits;
      if (a.add_z_loss) loss += o.z_loss * (m + log_sum) * (m + log_sum);
    }
    row_loss[n] = loss;
  }
}

// ---------------------------------------------------------------- reduce

template <class Acc>
void reduce(const CrossEntropyReduceArgs& a) {
  const Options<Acc> o(a.in);
  const Acc* row_loss = static_cast<const Acc*>(a.row_loss);
  const Acc* row_max = static_cast<const Acc*>(a.row_max);
  const Acc* row_log_sum = static_cast<const Acc*>(a.row_log_sum);
  double ce = 0, z = 0, weight = 0;
  int64_t count = 0;
  for (int64_t n = 0; n < a.in.N; ++n) {
    if (a.in.target && a.in.target[n] == a.in.ignore_index) continue;
    ce += row_loss[n];
    const double lse = static_cast<double>(row_max[n]) + row_log_sum[n];
    z += lse * lse;
    weight += a.in.target ? o.weight_of(a.in.target[n]) : Acc(1);
    ++count;
  }
  const bool mean = a.reduction == Reduction::kMean;
  const double ce_norm = mean ? 1.0 / weight : 1.0;
  const double z_norm = mean ? 1.0 / static_cast<double>(count) : 1.0;
  Acc* norm = static_cast<Acc*>(a.norm);
  norm[0] = static_cast<Acc>(ce_norm);
  norm[1] = static_cast<Acc>(z_norm);
  // Without z_loss its term is left out, not multiplied by zero: an infinite lse would make it NaN.
  const double loss = mean ? ce / weight : ce;
  *static_cast<Acc*>(a.loss) =
      static_cast<Acc>(a.in.z_loss == 0 ? loss : loss + a.in.z_loss * z * z_norm);
}

// ---------------------------------------------------------------- backward

// dx_v = scale * p_v - g w_v q_v with p_v = exp((x_v - m) - log_sum), times the cap's derivative.
template <class T, bool kCap, bool kTargetSums>
void backward_rows(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  const Options<Acc> o(in);
  const T* logits = static_cast<const T*>(in.logits);
  const T* probs = static_cast<const T*>(in.target_probs);
  const Acc* grad_loss = static_cast<const Acc*>(a.grad_loss);
  const Acc* grad_lse = static_cast<const Acc*>(a.grad_lse);
  const Acc* row_max = static_cast<const Acc*>(a.row_max);
  const Acc* row_log_sum = static_cast<const Acc*>(a.row_log_sum);
  const Acc* norm = static_cast<const Acc*>(a.norm);
  T* dlogits = static_cast<T*>(a.dlogits);
  alignas(64) Acc x_buffer[kBlock];
  alignas(64) Acc p_buffer[kBlock];
  alignas(64) Acc cap_buffer[kCap ? kBlock : 1];
  const Acc keep = probs ? Acc(1) - o.smoothing : Acc(0);
  const Acc uniform = o.smoothing / static_cast<Acc>(in.V);

  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = in.target ? in.target[n] : 0;
    const bool ignored = in.target && y == in.ignore_index;
    const Acc g = ignored || !grad_loss ? Acc(0) : grad_loss[n * a.grad_loss_stride];
    const Acc g_ce = g == 0 ? Acc(0) : g * (norm ? norm[0] : Acc(1));
    const Acc g_z = g == 0 ? Acc(0) : g * (norm ? norm[1] : Acc(1));
    const Acc g_lse = grad_lse ? grad_lse[n] : Acc(0);
    T* dx_n = dlogits + n * in.V;
    if (ignored && g_lse == 0) {
      __builtin_memset(dx_n, 0, in.V * sizeof(T));
      continue;
    }
    const T* x_n = logits + in.logits_rows.offset(n);
    const T* p_n = probs ? probs + in.target_probs_rows.offset(n) : nullptr;
    const Acc m = row_max[n];
    const Acc log_sum = row_log_sum[n];
    const Acc on_target = in.target ? g_ce * (Acc(1) - o.smoothing) * o.weight_of(y) : Acc(0);
    Acc mass = in.target ? o.smoothing * o.weight_sum / static_cast<Acc>(in.V) : Acc(0);
    if (p_n) {
      TargetSums<Acc> sums;
      for (int64_t v = 0; v < in.V; v += kBlock) {
        const int64_t len = in.V - v < kBlock ? in.V - v : kBlock;
        const Acc* p = stage<T, Acc, false>(p_n + v, len, Acc(0), Acc(0), p_buffer);
        add_targets(sums, p, p, o.weight ? o.weight + v : nullptr, keep, uniform, len);
      }
      mass = sums.mass;
    }
    const Acc z = o.z_loss == 0 ? Acc(0) : g_z * 2 * o.z_loss * (m + log_sum);
    const Acc rest = g_ce * mass + z + g_lse;
    const Acc scale = on_target + rest;
    Acc x_y = 0;
    Acc cap_derivative = 1;
    const V max_v = splat<V>(m);
    const V log_sum_v = splat<V>(log_sum);

    for (int64_t v = 0; v < in.V; v += kBlock) {
      const int64_t len = in.V - v < kBlock ? in.V - v : kBlock;
      const Acc* x = stage<T, Acc, kCap>(x_n + v, len, o.softcap,
                                         -static_cast<Acc>(__builtin_inf()), x_buffer, cap_buffer);
      const Acc* p = nullptr;
      if constexpr (kTargetSums) {
        if (p_n) p = stage<T, Acc, false>(p_n + v, len, Acc(0), Acc(0), p_buffer);
      }
      if (y >= v && y < v + len) {
        x_y = x[y - v];
        if constexpr (kCap) cap_derivative = cap_buffer[y - v];
      }
      const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
        const V x_v = load(x + i);
        V d = exp_nonpositive<Acc>((x_v - max_v) - log_sum_v) * scale;
        if constexpr (kTargetSums) {
          V q = splat<V>(uniform);
          if (p) q += load(p + i) * keep;
          if (o.weight) {
            V w = {};
            if (i + L <= len) {
              w = load(o.weight + v + i);
            } else {
              for (int64_t j = i; j < len; ++j) w[j - i] = o.weight[v + j];
            }
            q *= w;
          }
          d -= q * g_ce;
        }
        if constexpr (kCap) d *= load(cap_buffer + i);
        return d;
      };
      int64_t i = 0;
      for (; i + L <= len; i += L) {
        __builtin_prefetch(x_n + v + i + kPrefetchAhead);
        store(dx_n + v + i, gradient(i));
      }
      if (i < len) {
        const V d = gradient(i);
        for (int64_t j = i; j < len; ++j) store1(dx_n + v + j, d[j - i]);
      }
    }

    if (on_target != 0) {
      // p_y - 1 as expm1: exact where the model is sure, which is where the subtraction would
      // cancel.
      const Acc log_p = (x_y - m) - log_sum;
      Acc d = on_target * expm1_(log_p) + rest * exp1(log_p);
      if constexpr (kTargetSums) d -= g_ce * uniform * o.weight_of(y);
      store1(dx_n + y, d * cap_derivative);
    }
  }
}

// Calls f(T, kCap, kTargetSums) for the inputs' dtype and options.
template <class F>
void specialize(const CrossEntropyInputs& in, F&& f) {
  dispatch_dtype(in.dtype, [&](auto tag) {
    const bool sums = in.label_smoothing != 0 || in.target_probs;
    using False = std::false_type;
    using True = std::true_type;
    if (in.softcap > 0) {
      sums ? f(tag, True{}, True{}) : f(tag, True{}, False{});
    } else {
      sums ? f(tag, False{}, True{}) : f(tag, False{}, False{});
    }
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end) {
  specialize(a.in, [&](auto tag, auto cap, auto sums) {
    forward_rows<typename decltype(tag)::type, cap.value, sums.value>(a, begin, end);
  });
}

void cross_entropy_reduce(const CrossEntropyReduceArgs& a, int64_t, int64_t) {
  a.in.dtype == DType::kFloat64 ? reduce<double>(a) : reduce<float>(a);
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  specialize(a.in, [&](auto tag, auto cap, auto sums) {
    backward_rows<typename decltype(tag)::type, cap.value, sums.value>(a, begin, end);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
