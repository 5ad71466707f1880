// The pointwise part of the GRU and the RNN, a vector of units at a time.
#pragma once

#include "cpu/vmath.h"
#include "ops/gru_rnn.h"

namespace seqkern::cpu::SEQKERN_ISA {

// The GRU's gates of the same units, and u_n, the recurrent product in n.
template <class Acc>
struct GruGates {
  Vec<Acc> r, z, n, u_n;
};

// From a_r + u_r, a_z + u_z, a_n and u_n.
template <class Acc>
SEQKERN_INLINE GruGates<Acc> activate(GruGates<Acc> a) {
  const Vec<Acc> r = sigmoid<Acc>(a.r);
  return {r, sigmoid<Acc>(a.z), vtanh(Vec<Acc>(a.n + r * a.u_n)), a.u_n};
}

template <class Acc>
SEQKERN_INLINE Vec<Acc> next_h(const GruGates<Acc>& y, Vec<Acc> h_before) {
  return y.n + y.z * (h_before - y.n);
}

// Gradients at the inputs of r, z, n and at u_n; dh becomes what h_before gets directly.
template <class Acc>
SEQKERN_INLINE GruGates<Acc> gate_gradients(const GruGates<Acc>& y, Vec<Acc> h_before,
                                            Vec<Acc>& dh) {
  const Vec<Acc> one = splat<Vec<Acc>>(Acc(1));
  const Vec<Acc> dn = dh * (one - y.z) * (one - y.n * y.n);
  const GruGates<Acc> d = {dn * y.u_n * (y.r * (one - y.r)),
                           dh * (h_before - y.n) * (y.z * (one - y.z)), dn, dn * y.r};
  dh *= y.z;
  return d;
}

// NaN stays NaN.
template <class Acc>
SEQKERN_INLINE Vec<Acc> rnn_activate(bool relu, Vec<Acc> a) {
  return relu ? select(a < Acc(0), Vec<Acc>{}, a) : vtanh(a);
}
// The gradient at the activation's input, from its result.
template <class Acc>
SEQKERN_INLINE Vec<Acc> rnn_gradient(bool relu, Vec<Acc> h, Vec<Acc> dh) {
  return relu ? select(h <= Acc(0), Vec<Acc>{}, dh) : Vec<Acc>(dh * (Acc(1) - h * h));
}

}  // namespace seqkern::cpu::SEQKERN_ISA
