// One unit of one row and step of a GRU or RNN, in the accumulator type: shared by the kernels of
// one step and the kernel that stays for the whole sequence.
#pragma once

#include "cuda/recurrent.cuh"
#include "ops/gru_rnn.h"

namespace seqkern::cuda {

// ---------------------------------------------------------------- forward

// What comes from outside the recurrence, of unit j at row b, time t.
template <class T, bool kGru>
struct UnitInputs {
  static constexpr int G = kGru ? 3 : 1;
  using Acc = AccOf<T>;
  Loaded<T> x[G], b_ih[G], b_hh[G];

  __device__ __forceinline__ void load(const HiddenForwardArgs& a, int64_t t, int64_t b,
                                       int64_t j) {
    const int64_t at = (t * a.r.B + b) * G * a.r.H + j;
#pragma unroll
    for (int q = 0; q < G; ++q) {
      x[q].load(a.gates_x, at + q * a.r.H);
      b_ih[q].load(a.b_ih, q * a.r.H + j);
      b_hh[q].load(a.r.b_hh, q * a.r.H + j);
    }
  }
  __device__ __forceinline__ Acc input(int q) const { return x[q].value() + b_ih[q].value(); }
};

template <class Acc>
struct GruGates {
  Acc r, z, n, u_n;
};

template <class Acc>
__device__ __forceinline__ void activate(GruGates<Acc>& y) {
  y.r = sigmoid_of(y.r);
  y.z = sigmoid_of(y.z);
  y.n = tanh_of(y.n + y.r * y.u_n);
}

// h_t of a unit from w_hh h_{t-1}, of which products[q] is gate q's. y: what a GRU saves.
template <class T, bool kGru, class Acc, int kProducts>
__device__ __forceinline__ Acc next_h(const HiddenForwardArgs& a, const UnitInputs<T, kGru>& in,
                                      const Acc (&products)[kProducts], Acc h_before,
                                      GruGates<Acc>& y) {
  const auto recurrent = [&](int q) { return products[q] + in.b_hh[q].value(); };
  if constexpr (kGru) {
    y = {in.input(0) + recurrent(0), in.input(1) + recurrent(1), in.input(2), recurrent(2)};
    activate(y);
    return y.n + y.z * (h_before - y.n);
  } else {
    const Acc x = in.input(0) + recurrent(0);
    if (a.cell == HiddenCell::kRelu) return x < 0 ? Acc(0) : x;  // NaN stays NaN
    return tanh_of(x);
  }
}

// Writes what forward saves of a step.
template <class T, bool kGru>
__device__ __forceinline__ void save_gates(const HiddenForwardArgs& a, int64_t t, int64_t b,
                                           int64_t j, const GruGates<AccOf<T>>& y) {
  if (!kGru || !a.gates) return;
  const int64_t n = t * a.r.B + b, H = a.r.H;
  store_at<T>(a.gates, 3 * n * H + j, y.r);
  store_at<T>(a.gates, (3 * n + 1) * H + j, y.z);
  store_at<T>(a.gates, (3 * n + 2) * H + j, y.n);
  store_at<T>(a.u_n, n * H + j, y.u_n);
}

// ---------------------------------------------------------------- backward

// Gradients of a unit: at the inputs of r, z, n and at u_n; of an RNN one, r.
template <class Acc>
struct UnitGradients {
  Acc r, z, n, u_n;
  // At the recurrent product of gate q.
  __device__ __forceinline__ Acc recurrent(int q) const { return q == 0 ? r : q == 1 ? z : u_n; }
};

// What backward reads of step s, but for the gradient that comes from the next one.
template <class T, bool kGru>
struct SavedUnit {
  using Acc = AccOf<T>;
  Loaded<T> gates[kGru ? 4 : 1], h, grad_h;

  __device__ __forceinline__ void load(const HiddenBackwardArgs& a, int64_t L, int64_t s, int64_t b,
                                       int64_t j) {
    const RecurrentInputs& r = a.r;
    const int64_t t = time_of(r, L, s), n = t * r.B + b;
    grad_h.load(a.dh, t * a.dh_strides.t + b * a.dh_strides.b + j);
    if constexpr (kGru) {
#pragma unroll
      for (int q = 0; q < 3; ++q) gates[q].load(a.gates, (3 * n + q) * r.H + j);
      gates[3].load(a.u_n, n * r.H + j);
      if (s > 0) {
        h.load(a.h, (time_of(r, L, s - 1) * r.B + b) * r.H + j);
      } else {
        h.load(r.h0, b * r.H + j);
      }
    } else {
      h.load(a.h, n * r.H + j);
    }
  }

  // From `later`, the gradient of h_t through the steps after; it becomes what h_{t-1} gets past
  // the gates.
  __device__ __forceinline__ UnitGradients<Acc> gradients(const HiddenBackwardArgs& a,
                                                          Acc& later) const {
    const Acc dh = later + grad_h.value(), h_value = h.value();
    if constexpr (kGru) {
      GruGates<Acc> y = {gates[0].value(), gates[1].value(), gates[2].value(), gates[3].value()};
      if (!a.activated) activate(y);
      later = dh * y.z;
      const Acc dn = dh * (1 - y.z) * (1 - y.n * y.n);
      return {dn * y.u_n * (y.r * (1 - y.r)), dh * (h_value - y.n) * (y.z * (1 - y.z)), dn,
              dn * y.r};
    } else {
      later = 0;
      const bool relu = a.cell == HiddenCell::kRelu;
      const Acc da = relu ? (h_value <= 0 ? Acc(0) : dh) : dh * (1 - h_value * h_value);
      return {da, 0, 0, 0};
    }
  }
};

// Writes the gradients of step s, as the sums over the sequence read them.
template <class T, bool kGru>
__device__ __forceinline__ void save_gradients(const HiddenBackwardArgs& a, int64_t t, int64_t s,
                                               int64_t b, int64_t j,
                                               const UnitGradients<AccOf<T>>& d) {
  constexpr int G = kGru ? 3 : 1;
  const int64_t n = t * a.r.B + b, H = a.r.H;
  store_at<T>(a.dgates, G * n * H + j, d.r);
  if (kGru) {
    store_at<T>(a.dgates, (G * n + 1) * H + j, d.z);
    store_at<T>(a.dgates, (G * n + 2) * H + j, d.n);
    if (a.du_n) store_at<T>(a.du_n, n * H + j, d.u_n);
  }
  if (s != 0 || !a.du_0) return;
#pragma unroll
  for (int q = 0; q < G; ++q) store_at<T>(a.du_0, (G * b + q) * H + j, d.recurrent(q));
}

// The gradients of a unit at a time t where the row has no step.
template <class T, bool kGru>
__device__ __forceinline__ void zero_gradients(const HiddenBackwardArgs& a, int64_t t, int64_t b,
                                               int64_t j) {
  save_gradients<T, kGru>(a, t, t, b, j, {});
}

// ---------------------------------------------------------------- the two ways over a sequence

// Launches per step: any shape.
void hidden_forward_steps(const HiddenForwardArgs& a, cudaStream_t stream);
void hidden_backward_steps(const HiddenBackwardArgs& a, cudaStream_t stream);
int64_t hidden_backward_steps_workspace(const HiddenBackwardArgs& a);

// Calls f(TypeTag<T>{}, std::bool_constant<is it a GRU>{}).
template <class F>
decltype(auto) dispatch_cell(DType dtype, HiddenCell cell, F&& f) {
  return dispatch_dtype(dtype, [&](auto tag) -> decltype(auto) {
    if (cell == HiddenCell::kGru) return f(tag, std::true_type{});
    return f(tag, std::false_type{});
  });
}

// Calls f(TypeTag<T>, is it a GRU, "<gru, name of the dtype>"): the resource table.
template <class F>
void for_each_cell_type(F&& f) {
  for_each_float_type([&](auto tag, const std::string& dtype) {
    f(tag, std::true_type{}, "<gru, " + dtype + ">");
    f(tag, std::false_type{}, "<rnn, " + dtype + ">");
  });
}

}  // namespace seqkern::cuda
