// Softmax-cross-entropy on the CPU, backward: the logits are read once and the gradient is written
// once.
#include "cpu/cross_entropy.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

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
    // An ignored row's target need not be a class: it has neither a weight nor an element.
    const bool on_class = in.target && !ignored;
    const Acc on_target = on_class ? g_ce * (Acc(1) - o.smoothing) * o.weight_of(y) : Acc(0);
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
      Acc d = on_target * expm1_nonpositive<Acc>(splat<V>(log_p))[0];
      if (rest != 0) d += rest * exp1(log_p);
      if constexpr (kTargetSums) d -= g_ce * uniform * o.weight_of(y);
      store1(dx_n + y, d * cap_derivative);
    }
  }
}

}  // namespace

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  specialize(a.in, [&](auto tag, auto cap, auto sums) {
    backward_rows<typename decltype(tag)::type, cap.value, sums.value>(a, begin, end);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
