// What forward and backward of softmax-cross-entropy share: options and specialisation.
#pragma once

#include "cpu/softmax.h"
#include "ops/cross_entropy.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

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

inline bool ignores(const CrossEntropyInputs& in, int64_t n) {
  return in.target && in.target[n] == in.ignore_index;
}

// Writes row n. x_y is the logit of its class, extra the loss of a target distribution.
template <class Acc>
SEQKERN_INLINE void finish_row(const CrossEntropyForwardArgs& a, const Options<Acc>& o, int64_t n,
                               Acc m, Acc log_sum, Acc x_y, Acc extra) {
  const bool ignored = ignores(a.in, n);
  if (ignored && !a.lse) m = log_sum = 0;
  static_cast<Acc*>(a.row_max)[n] = m;
  static_cast<Acc*>(a.row_log_sum)[n] = log_sum;
  if (a.lse) static_cast<Acc*>(a.lse)[n] = m + log_sum;
  Acc loss = 0;
  if (!ignored) {
    loss = extra;
    if (a.in.target) {
      loss += (Acc(1) - o.smoothing) * o.weight_of(a.in.target[n]) * (log_sum + (m - x_y));
    }
    if (a.add_z_loss) loss += o.z_loss * (m + log_sum) * (m + log_sum);
  }
  static_cast<Acc*>(a.row_loss)[n] = loss;
}

// What row n's gradient is made of: dx_v = scale * p_v - g_ce w_v q_v, and for its class
// on_target * (p - 1) + rest * p.
template <class Acc>
struct RowGradient {
  bool none = true;  // all of it is 0
  Acc g_ce = 0, g_lse = 0, z = 0, on_target = 0, rest = 0;

  RowGradient() = default;
  RowGradient(const CrossEntropyBackwardArgs& a, const Options<Acc>& o, int64_t n) {
    const CrossEntropyInputs& in = a.in;
    const bool ignored = ignores(in, n);
    const Acc* norm = static_cast<const Acc*>(a.norm);
    const Acc g = ignored || !a.grad_loss
                      ? Acc(0)
                      : static_cast<const Acc*>(a.grad_loss)[n * a.grad_loss_stride];
    g_ce = g == 0 ? Acc(0) : g * (norm ? norm[0] : Acc(1));
    g_lse = a.grad_lse ? static_cast<const Acc*>(a.grad_lse)[n] : Acc(0);
    none = ignored && g_lse == 0;
    if (o.z_loss != 0) {
      const Acc lse =
          static_cast<const Acc*>(a.row_max)[n] + static_cast<const Acc*>(a.row_log_sum)[n];
      z = (g == 0 ? Acc(0) : g * (norm ? norm[1] : Acc(1))) * 2 * o.z_loss * lse;
    }
    // An ignored row's target need not be a class: it has neither a weight nor an element.
    if (in.target && !ignored) {
      on_target = g_ce * (Acc(1) - o.smoothing) * o.weight_of(in.target[n]);
    }
    set_mass(in.target ? o.smoothing * o.weight_sum / static_cast<Acc>(in.V) : Acc(0));
  }
  // Of w_v q_v over the row.
  void set_mass(Acc mass) { rest = g_ce * mass + z + g_lse; }
  Acc scale() const { return on_target + rest; }
  // p - 1 apart from p: exact where the model is sure, which is where the subtraction would cancel.
  Acc of_class(Acc p_less_1, Acc p) const {
    return rest == 0 ? on_target * p_less_1 : on_target * p_less_1 + rest * p;
  }
};

}  // namespace

// Rows [begin, end) where there are few classes and no options; false: nothing was done.
bool forward_of_few(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end);
bool backward_of_few(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end);

// Rows [begin, end) of inputs with columns.
void forward_columns(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end);
void backward_columns(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end);

}  // namespace seqkern::cpu::SEQKERN_ISA
