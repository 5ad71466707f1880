// The pointwise part of one step of an LSTM, after its products.
#pragma once

#include "cpu/lstm.h"
#include "cpu/lstm_step.h"
#include "cpu/packing.h"

namespace seqkern::cpu::SEQKERN_ISA {

// Units [first, first + units) of row b. sum(gate, v): the products of a gate of units first + v
// and on, without the biases.
template <class T, class Sum>
SEQKERN_INLINE void step_cell(const LstmStepForwardArgs& args, int64_t b, int64_t first,
                              int64_t units, Sum sum) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const LstmStepInputs& in = args.in;
  const int64_t H = in.H;
  const auto row = [&](const void* rows, int64_t n) {
    return rows ? static_cast<const T*>(rows) + n * H + first : nullptr;
  };
  const T* c0 = row(in.c0, b);
  T* gates = args.gates ? static_cast<T*>(args.gates) + 4 * b * H + first : nullptr;
  T* c_b = static_cast<T*>(args.c) + b * H + first;
  T* h_b = static_cast<T*>(args.h) + b * H + first;
  for (int64_t v = 0; v < units; v += L) {
    const int64_t count = units - v < L ? units - v : L;
    const auto input = [&](int64_t gate) __attribute__((always_inline)) {
      V a = sum(gate, v);
      if (in.b_ih) a += load_part<Acc>(row(in.b_ih, gate) + v, count);
      if (in.b_hh) a += load_part<Acc>(row(in.b_hh, gate) + v, count);
      return a;
    };
    const Gates<Acc> y = activate<Acc>({input(0), input(1), input(2), input(3)});
    const auto [c, m] = next_state<Acc>(y, c0 ? load_part<Acc>(c0 + v, count) : V{});
    store_part<Acc>(c_b + v, c, count);
    store_part<Acc>(h_b + v, m, count);
    if (!gates) continue;
    store_part<Acc>(gates + v, y.i, count);
    store_part<Acc>(gates + H + v, y.f, count);
    store_part<Acc>(gates + 2 * H + v, y.g, count);
    store_part<Acc>(gates + 3 * H + v, y.o, count);
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
