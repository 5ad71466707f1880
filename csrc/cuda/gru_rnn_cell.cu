// The pointwise part of one step of a GRU or RNN, forward and backward: as a sequence of one step,
// whose recurrent products are there already. A thread takes a unit of a row.
#include "cuda/cell_launch.cuh"
#include "cuda/gru_rnn.cuh"
#include "cuda/kernels.h"

namespace seqkern::cuda {
namespace {

template <class T, bool kGru>
__global__ void __launch_bounds__(kCellThreads)
    hidden_cell_forward_kernel(const __grid_constant__ HiddenForwardArgs a,
                               const void* __restrict__ gates_h) {
  using Acc = AccOf<T>;
  constexpr int G = kGru ? 3 : 1;
  const int64_t H = a.r.H, n = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  if (n >= a.r.B * H) return;
  const int64_t b = n / H, j = n % H;
  UnitInputs<T, kGru> x;
  x.load(a, 0, b, j);
  Acc products[G];
#pragma unroll
  for (int q = 0; q < G; ++q) {
    products[q] = load1(static_cast<const T*>(gates_h) + (b * G + q) * H + j);
  }
  GruGates<Acc> y = {};
  const Acc h = next_h(a, x, products, load1(static_cast<const T*>(a.r.h0) + n), y);
  save_gates<T, kGru>(a, 0, b, j, y);
  store_at<T>(a.h, n, h);
}

template <class T, bool kGru>
__global__ void __launch_bounds__(kCellThreads)
    hidden_cell_backward_kernel(const __grid_constant__ HiddenBackwardArgs a) {
  using Acc = AccOf<T>;
  const int64_t H = a.r.H, n = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  if (n >= a.r.B * H) return;
  const int64_t b = n / H, j = n % H;
  SavedUnit<T, kGru> unit;
  unit.load(a, 1, 0, b, j);
  Acc past = 0;
  const UnitGradients<Acc> d = unit.gradients(a, past);
  save_gradients<T, kGru>(a, 0, 0, b, j, d);
  if (a.dh0) store_at<T>(a.dh0, n, past);
}

// ---------------------------------------------------------------- launching

RecurrentInputs one_step(DType dtype, int64_t B, int64_t H, const void* b_hh, const void* h0) {
  return {.dtype = dtype,
          .T = 1,
          .B = B,
          .H = H,
          .P = H,
          .w_hh = nullptr,
          .b_hh = b_hh,
          .h0 = h0,
          .lengths = nullptr,
          .reverse = false,
          .first_token = nullptr};
}

}  // namespace

void hidden_cell_forward(const HiddenCellForwardArgs& a, Stream stream) {
  const HiddenForwardArgs step{.r = one_step(a.dtype, a.B, a.H, a.b_hh, a.h0),
                               .cell = a.cell,
                               .b_ih = a.b_ih,
                               .gates_x = a.gates_x,
                               .gates = a.gates,
                               .u_n = a.u_n,
                               .h = a.h,
                               .h_n = nullptr,
                               .workspace = nullptr};
  dispatch_cell(a.dtype, a.cell, [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>) {
    launch(hidden_cell_forward_kernel<T, kGru>,
           cell_config(kGru ? "gru_cell" : "rnn_cell", a.B * a.H, stream), step, a.gates_h);
  });
}

void hidden_cell_backward(const HiddenCellBackwardArgs& a, Stream stream) {
  const HiddenBackwardArgs step{.r = one_step(a.dtype, a.B, a.H, nullptr, a.h0),
                                .cell = a.cell,
                                .gates = a.gates,
                                .u_n = a.u_n,
                                .activated = true,
                                .h = a.h,
                                .dh = a.dh,
                                .dh_strides = {0, a.H},
                                .dh_n = nullptr,
                                .dgates = a.dgates,
                                .du_n = nullptr,
                                .du_0 = a.du,
                                .dh0 = a.past,
                                .workspace = nullptr};
  dispatch_cell(a.dtype, a.cell, [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>) {
    launch(hidden_cell_backward_kernel<T, kGru>,
           cell_config(kGru ? "gru_cell_backward" : "rnn_cell_backward", a.B * a.H, stream), step);
  });
}

void visit_gru_rnn_cell_kernels(VisitKernel visit, void* context) {
  for_each_cell_type(
      [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>, const std::string& of) {
        visit(context, ("hidden_cell" + of).c_str(),
              reinterpret_cast<const void*>(hidden_cell_forward_kernel<T, kGru>));
        visit(context, ("hidden_cell_backward" + of).c_str(),
              reinterpret_cast<const void*>(hidden_cell_backward_kernel<T, kGru>));
      });
}

}  // namespace seqkern::cuda
