// What the cells of one step differ in: which products a unit needs, and the pointwise part.
//
// A unit of a cell has G rows in each weight and kSums sums of products: gate g of the product with
// x goes to sum g, and of the product with h to sum recurrent_sum(g), which is the same one but for
// the GRU's u_n.
#pragma once

#include "cpu/cell_step.h"
#include "cpu/gru_rnn.h"
#include "cpu/lstm.h"
#include "cpu/packing.h"

namespace seqkern::cpu::SEQKERN_ISA {

// Rows of T [.., width] at some units, of which `count` of a vector are there.
template <class T>
struct StepUnits {
  using Acc = AccOf<T>;
  int64_t width, unit, count;

  __attribute__((always_inline)) Vec<Acc> load(const void* rows, int64_t n) const {
    return rows ? load_part<Acc>(static_cast<const T*>(rows) + n * width + unit, count)
                : Vec<Acc>{};
  }
  __attribute__((always_inline)) void store(void* rows, int64_t n, Vec<Acc> v) const {
    if (rows) store_part<Acc>(static_cast<T*>(rows) + n * width + unit, v, count);
  }
};

// forward(args, b, at, sum): units `at` of row b from sum(s), their products without the biases.
// backward(args, b, at, put): put(q, v) takes the gradients at the inputs of gate q, and of the GRU
// at u_n as q = 3; what h0 gets past the gates is returned.

struct LstmStep {
  static constexpr int G = 4, kSums = 4;
  static constexpr int recurrent_sum(int gate) { return gate; }

  template <class T, class Sum>
  SEQKERN_INLINE void forward(const CellStepForwardArgs& args, int64_t b, const StepUnits<T>& at,
                              Sum sum) {
    using Acc = AccOf<T>;
    const CellStepInputs& in = args.in;
    const auto input = [&](int gate) __attribute__((always_inline)) {
      return Vec<Acc>(sum(gate) + at.load(in.b_ih, gate) + at.load(in.b_hh, gate));
    };
    const Gates<Acc> y = activate<Acc>(Gates<Acc>{input(0), input(1), input(2), input(3)});
    const auto [c, m] = next_state<Acc>(y, at.load(in.c0, b));
    at.store(args.c, b, c);
    at.store(args.h, b, m);
    if (!args.gates) return;
    at.store(args.gates, 4 * b, y.i);
    at.store(args.gates, 4 * b + 1, y.f);
    at.store(args.gates, 4 * b + 2, y.g);
    at.store(args.gates, 4 * b + 3, y.o);
  }

  template <class T, class Put>
  SEQKERN_INLINE Vec<AccOf<T>> backward(const CellStepBackwardArgs& args, int64_t b,
                                        const StepUnits<T>& at, Put put) {
    using Acc = AccOf<T>;
    const Gates<Acc> y = {at.load(args.gates, 4 * b), at.load(args.gates, 4 * b + 1),
                          at.load(args.gates, 4 * b + 2), at.load(args.gates, 4 * b + 3)};
    Vec<Acc> dc = at.load(args.dc, b);
    const Gates<Acc> d = gate_gradients<Acc>(y, at.load(args.in.c0, b), vtanh(at.load(args.c, b)),
                                             at.load(args.dh, b), dc);
    put(0, d.i), put(1, d.f), put(2, d.g), put(3, d.o);
    at.store(args.dc0, b, dc);
    return Vec<Acc>{};
  }
};

struct GruStep {
  static constexpr int G = 3, kSums = 4;
  static constexpr int recurrent_sum(int gate) { return gate < 2 ? gate : 3; }

  template <class T, class Sum>
  SEQKERN_INLINE void forward(const CellStepForwardArgs& args, int64_t b, const StepUnits<T>& at,
                              Sum sum) {
    using Acc = AccOf<T>;
    const CellStepInputs& in = args.in;
    const auto input = [&](int gate) __attribute__((always_inline)) {
      return Vec<Acc>(sum(gate) + at.load(in.b_ih, gate) + at.load(in.b_hh, gate));
    };
    const GruGates<Acc> y = activate<Acc>(GruGates<Acc>{
        input(0), input(1), sum(2) + at.load(in.b_ih, 2), sum(3) + at.load(in.b_hh, 2)});
    at.store(args.h, b, next_h<Acc>(y, at.load(in.h0, b)));
    if (!args.gates) return;
    at.store(args.gates, 3 * b, y.r);
    at.store(args.gates, 3 * b + 1, y.z);
    at.store(args.gates, 3 * b + 2, y.n);
    at.store(args.u_n, b, y.u_n);
  }

  template <class T, class Put>
  SEQKERN_INLINE Vec<AccOf<T>> backward(const CellStepBackwardArgs& args, int64_t b,
                                        const StepUnits<T>& at, Put put) {
    using Acc = AccOf<T>;
    const GruGates<Acc> y = {at.load(args.gates, 3 * b), at.load(args.gates, 3 * b + 1),
                             at.load(args.gates, 3 * b + 2), at.load(args.u_n, b)};
    Vec<Acc> dh = at.load(args.dh, b);
    const GruGates<Acc> d = gate_gradients<Acc>(y, at.load(args.in.h0, b), dh);
    put(0, d.r), put(1, d.z), put(2, d.n), put(3, d.u_n);
    return dh;
  }
};

struct RnnStep {
  static constexpr int G = 1, kSums = 1;
  static constexpr int recurrent_sum(int gate) { return gate; }

  template <class T, class Sum>
  SEQKERN_INLINE void forward(const CellStepForwardArgs& args, int64_t b, const StepUnits<T>& at,
                              Sum sum) {
    using Acc = AccOf<T>;
    const CellStepInputs& in = args.in;
    at.store(args.h, b,
             rnn_activate<Acc>(in.cell == StepCell::kRelu,
                               Vec<Acc>(sum(0) + at.load(in.b_ih, 0) + at.load(in.b_hh, 0))));
  }

  template <class T, class Put>
  SEQKERN_INLINE Vec<AccOf<T>> backward(const CellStepBackwardArgs& args, int64_t b,
                                        const StepUnits<T>& at, Put put) {
    using Acc = AccOf<T>;
    put(0, rnn_gradient<Acc>(args.in.cell == StepCell::kRelu, at.load(args.h, b),
                             at.load(args.dh, b)));
    return Vec<Acc>{};
  }
};

// f(TypeTag<T>, the cell) for cells with G rows of weights per unit.
template <class F>
auto dispatch_step(DType dtype, int64_t G, F f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    return G == LstmStep::G  ? f(tag, LstmStep{})
           : G == GruStep::G ? f(tag, GruStep{})
                             : f(tag, RnnStep{});
  });
}
template <class F>
auto dispatch_step(const CellStepInputs& in, F f) {
  return dispatch_step(in.dtype, gates_of(in.cell), f);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
