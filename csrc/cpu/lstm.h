// The pointwise part of the LSTM, a vector of units at a time.
#pragma once

#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {

// The four gates of the same units, activated or not.
template <class Acc>
struct Gates {
  Vec<Acc> i, f, g, o;
};

template <class Acc>
SEQKERN_INLINE Gates<Acc> activate(Gates<Acc> a) {
  return {sigmoid<Acc>(a.i), sigmoid<Acc>(a.f), vtanh(a.g), sigmoid<Acc>(a.o)};
}

template <class Acc>
struct CellState {
  Vec<Acc> c, m;  // m = o tanh(c)
};

// One step of the same units, from their activated gates.
template <class Acc>
SEQKERN_INLINE CellState<Acc> next_state(Gates<Acc> y, Vec<Acc> c_before) {
  const Vec<Acc> c = y.f * c_before + y.i * y.g;
  return {c, y.o * vtanh(c)};
}

// Gradients at the four gates' inputs; dc, the gradient at c, becomes the one at c before.
template <class Acc>
SEQKERN_INLINE Gates<Acc> gate_gradients(Gates<Acc> y, Vec<Acc> c_before, Vec<Acc> tanh_c,
                                         Vec<Acc> dm, Vec<Acc>& dc) {
  dc += dm * y.o * (Acc(1) - tanh_c * tanh_c);
  const Gates<Acc> d = {dc * y.g * (y.i * (Acc(1) - y.i)), dc * c_before * (y.f * (Acc(1) - y.f)),
                        dc * y.i * (Acc(1) - y.g * y.g), dm * tanh_c * (y.o * (Acc(1) - y.o))};
  dc *= y.f;
  return d;
}

}  // namespace seqkern::cpu::SEQKERN_ISA
