// The pointwise part of the LSTM, in the accumulator type: shared by the cell, the kernels of one
// step and the kernel that stays for the whole sequence.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/recurrent.cuh"
#include "ops/lstm.h"

namespace seqkern::cuda {

// gates: a_i, a_f, a_g, a_o in, activated out; c_{t-1} becomes c_t. Returns m_t = o tanh(c_t).
template <class Acc>
__device__ __forceinline__ void activate(Acc (&gates)[4]) {
  gates[0] = sigmoid_of(gates[0]);
  gates[1] = sigmoid_of(gates[1]);
  gates[2] = tanh_of(gates[2]);
  gates[3] = sigmoid_of(gates[3]);
}
template <class Acc>
__device__ __forceinline__ Acc cell_forward(Acc (&gates)[4], Acc& c) {
  activate(gates);
  c = gates[1] * c + gates[0] * gates[2];
  return gates[3] * tanh_of(c);
}

// Gradients d at a_i, a_f, a_g, a_o of one unit from its activated gates; dc, the gradient at c_t
// but for what passes through m_t, becomes that at c_{t-1}.
template <class Acc>
__device__ __forceinline__ void cell_backward(const Acc (&gates)[4], Acc c_before, Acc c, Acc dm,
                                              Acc& dc, Acc (&d)[4]) {
  const Acc i = gates[0], f = gates[1], g = gates[2], o = gates[3];
  const Acc tanh_c = tanh_of(c);
  dc += dm * o * (1 - tanh_c * tanh_c);
  d[0] = dc * g * i * (1 - i);
  d[1] = dc * c_before * f * (1 - f);
  d[2] = dc * i * (1 - g * g);
  d[3] = dm * tanh_c * o * (1 - o);
  dc *= f;
}

// ---------------------------------------------------------------- one unit of one row and step

// Where unit j of row b has its values of time t, in elements.
struct StepOffsets {
  int64_t gates_x, gates, c, h;

  StepOffsets() = default;
  __device__ __forceinline__ StepOffsets(const LstmForwardArgs& a, int64_t t, int64_t b, int64_t j)
      : gates_x(t * a.gates_x_strides.t + b * a.gates_x_strides.b + j),
        gates(4 * (t * a.in.r.B + b) * a.in.r.H + j),
        c((t * a.in.r.B + b) * a.in.r.H + j),
        h(t * a.h_strides.t + b * a.h_strides.b + j) {}

  // To those of the row's next step.
  __device__ __forceinline__ void advance(const LstmForwardArgs& a) {
    const int64_t n = a.in.r.B * a.in.r.H;
    const auto step = [&](int64_t elements) { return a.in.r.reverse ? -elements : elements; };
    gates_x += step(a.gates_x_strides.t);
    gates += step(4 * n);
    c += step(n);
    h += step(a.h_strides.t);
  }
};

// b_hh of unit j.
template <class T>
struct GateBias {
  Loaded<T> gate[4];

  __device__ __forceinline__ void load(const RecurrentInputs& r, int64_t j) {
#pragma unroll
    for (int q = 0; q < 4; ++q) gate[q].load(r.b_hh, q * r.H + j);
  }
};

// gates_x of one unit, row and step.
template <class T>
struct GateInputs {
  Loaded<T> x[4];

  __device__ __forceinline__ void load(const LstmForwardArgs& a, const StepOffsets& at) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      x[q].stored = static_cast<const T*>(a.gates_x)[at.gates_x + q * a.in.r.H];
    }
  }
  // To L2, of the row's `steps`-th step after this one.
  __device__ static __forceinline__ void prefetch(const LstmForwardArgs& a, const StepOffsets& at,
                                                  int steps) {
    const int64_t ahead = steps * a.gates_x_strides.t;
    const T* x = static_cast<const T*>(a.gates_x) + at.gates_x + (a.in.r.reverse ? -ahead : ahead);
#pragma unroll
    for (int q = 0; q < 4; ++q) prefetch_l2(x + q * a.in.r.H);
  }
  __device__ __forceinline__ void add_to(AccOf<T> (&gates)[4], const GateBias<T>& bias) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q] += x[q].value() + bias.gate[q].value();
  }
};

// Writes what forward saves of a step.
template <class T>
__device__ __forceinline__ void save_step(const LstmForwardArgs& a, const StepOffsets& at,
                                          const AccOf<T> (&gates)[4], AccOf<T> c) {
  if (a.gates) {
#pragma unroll
    for (int q = 0; q < 4; ++q) store_at<T>(a.gates, at.gates + q * a.in.r.H, gates[q]);
  }
  if (a.c) store_at<T>(a.c, at.c, c);
}

// Where unit j of row b has its values of step s < L for backward, in elements.
struct BackwardOffsets {
  int64_t gates, c, before, h;  // gates, dgates; c, dc; c of step s - 1, if there is one; dh

  BackwardOffsets() = default;
  __device__ __forceinline__ BackwardOffsets(const LstmBackwardArgs& a, int64_t L, int64_t s,
                                             int64_t b, int64_t j) {
    const RecurrentInputs& r = a.in.r;
    const int64_t t = time_of(r, L, s);
    gates = 4 * (t * r.B + b) * r.H + j;
    c = (t * r.B + b) * r.H + j;
    before = (time_of(r, L, s - 1) * r.B + b) * r.H + j;
    h = t * a.dh_strides.t + b * a.dh_strides.b + j;
  }

  // To those of step s - 1.
  __device__ __forceinline__ void go_back(const LstmBackwardArgs& a) {
    const int64_t n = a.in.r.B * a.in.r.H;
    const auto step = [&](int64_t elements) { return a.in.r.reverse ? elements : -elements; };
    gates += step(4 * n);
    c = before;
    before += step(n);
    h += step(a.dh_strides.t);
  }
};

// What backward reads of step s, but for the gradient that comes from the next one.
template <class T>
struct SavedStep {
  Loaded<T> saved[4], before, after, grad_h, grad_c;

  __device__ __forceinline__ void load(const LstmBackwardArgs& a, const BackwardOffsets& at,
                                       int64_t s, int64_t b, int64_t j) {
    const int64_t H = a.in.r.H;
#pragma unroll
    for (int q = 0; q < 4; ++q) saved[q].load(a.gates, at.gates + q * H);
    after.load(a.c, at.c);
    if (s > 0) {
      before.load(a.c, at.before);
    } else {
      before.load(a.in.c0, b * H + j);
    }
    grad_c.load(a.dc, at.c);
    // With a projection the gradient of h is not one of a unit: the caller has it.
    if (!a.in.w_hr) grad_h.load(a.dh, at.h);
  }

  // The activated gates.
  __device__ __forceinline__ void gates(const LstmBackwardArgs& a, AccOf<T> (&g)[4]) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) g[q] = saved[q].value();
    if (!a.activated) activate(g);
  }
};

// Writes dgates of step s, as the sums over the sequence read them.
template <class T>
__device__ __forceinline__ void save_dgates(const LstmBackwardArgs& a, const BackwardOffsets& at,
                                            int64_t s, int64_t b, int64_t j,
                                            const AccOf<T> (&d)[4]) {
  const int64_t H = a.in.r.H;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    store_at<T>(a.dgates, at.gates + q * H, d[q]);
    if (s == 0 && a.dgates_0) store_at<T>(a.dgates_0, (4 * b + q) * H + j, d[q]);
  }
}

// dgates of a unit where the row has no step.
template <class T>
__device__ __forceinline__ void zero_dgates(const LstmBackwardArgs& a, int64_t t, int64_t b,
                                            int64_t j) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    store_at<T>(a.dgates, (4 * (t * a.in.r.B + b) + q) * a.in.r.H + j, AccOf<T>(0));
  }
}

// ---------------------------------------------------------------- the two ways over a sequence

// One launch per step (and product): any shape, with a projection too.
void lstm_forward_steps(const LstmForwardArgs& a, cudaStream_t stream);
void lstm_backward_steps(const LstmBackwardArgs& a, cudaStream_t stream);
int64_t lstm_forward_steps_workspace(const LstmForwardArgs& a);
int64_t lstm_backward_steps_workspace(const LstmBackwardArgs& a);

}  // namespace seqkern::cuda
