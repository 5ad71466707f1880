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

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
