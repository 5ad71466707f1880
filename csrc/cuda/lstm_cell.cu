// The pointwise part of one LSTM step, forward and backward: a thread takes as many neighbouring
// units as fill 16 bytes, where H is a multiple of that.
#include "cuda/cell_launch.cuh"
#include "cuda/kernels.h"
#include "cuda/lstm.cuh"

namespace seqkern::cuda {
namespace {

// x[i] += p[i] where there is p.
template <int P, class T>
__device__ __forceinline__ void add_run(const void* p, int64_t at, AccOf<T> (&x)[P]) {
  if (!p) return;
  AccOf<T> more[P];
  load_run<P>(static_cast<const T*>(p) + at, more);
#pragma unroll
  for (int i = 0; i < P; ++i) x[i] += more[i];
}

template <class T, int P>
__global__ void __launch_bounds__(kCellThreads)
    lstm_cell_forward_kernel(const __grid_constant__ LstmCellForwardArgs a) {
  using Acc = AccOf<T>;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x) * P;
  if (n >= a.B * a.H) return;
  const int64_t b = n / a.H, j = n % a.H;
  Acc gates[4][P];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int64_t at = (4 * b + q) * a.H + j;
    load_run<P>(static_cast<const T*>(a.gates_x) + at, gates[q]);
    add_run<P, T>(a.gates_h, at, gates[q]);
    add_run<P, T>(a.bias, q * a.H + j, gates[q]);
  }
  Acc c[P], h[P];
  load_run<P>(static_cast<const T*>(a.c0) + n, c);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    Acc unit[4] = {gates[0][i], gates[1][i], gates[2][i], gates[3][i]};
    h[i] = cell_forward(unit, c[i]);
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q][i] = unit[q];
  }
  if (a.gates) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      store_run(static_cast<T*>(a.gates) + (4 * b + q) * a.H + j, gates[q]);
    }
  }
  store_run(static_cast<T*>(a.h) + n, h);
  store_run(static_cast<T*>(a.c) + n, c);
}

template <class T, int P>
__global__ void __launch_bounds__(kCellThreads)
    lstm_cell_backward_kernel(const __grid_constant__ LstmCellBackwardArgs a) {
  using Acc = AccOf<T>;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x) * P;
  if (n >= a.B * a.H) return;
  const int64_t b = n / a.H, j = n % a.H;
  Acc gates[4][P], c0[P], c[P], dh[P] = {}, dc[P] = {};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    load_run<P>(static_cast<const T*>(a.gates) + (4 * b + q) * a.H + j, gates[q]);
  }
  load_run<P>(static_cast<const T*>(a.c0) + n, c0);
  load_run<P>(static_cast<const T*>(a.c) + n, c);
  add_run<P, T>(a.dh, n, dh);
  add_run<P, T>(a.dc, n, dc);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const Acc unit[4] = {gates[0][i], gates[1][i], gates[2][i], gates[3][i]};
    Acc d[4];
    cell_backward(unit, c0[i], c[i], dh[i], dc[i], d);
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q][i] = d[q];
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    store_run(static_cast<T*>(a.dgates) + (4 * b + q) * a.H + j, gates[q]);
  }
  store_run(static_cast<T*>(a.dc0) + n, dc);
}

// ---------------------------------------------------------------- launching

// Calls f(TypeTag<T>, units per thread) for the dtype and width.
template <class Args, class F>
void specialize(const Args& a, F&& f) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    constexpr int P = kPack<typename decltype(tag)::type>;
    a.H % P == 0 ? f(tag, std::integral_constant<int, P>{})
                 : f(tag, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void lstm_cell_forward(const LstmCellForwardArgs& a, Stream stream) {
  specialize(a, [&]<class T, int P>(TypeTag<T>, std::integral_constant<int, P>) {
    launch(lstm_cell_forward_kernel<T, P>, cell_config("lstm_cell", a.B * a.H / P, stream), a);
  });
}

void lstm_cell_backward(const LstmCellBackwardArgs& a, Stream stream) {
  specialize(a, [&]<class T, int P>(TypeTag<T>, std::integral_constant<int, P>) {
    launch(lstm_cell_backward_kernel<T, P>,
           cell_config("lstm_cell_backward", a.B * a.H / P, stream), a);
  });
}

void visit_lstm_cell_kernels(VisitKernel visit, void* context) {
  for_each_float_type([&]<class T>(TypeTag<T>, const std::string& dtype) {
    const auto add = [&]<int P>(std::integral_constant<int, P>, const std::string& options) {
      visit(context, ("lstm_cell<" + dtype + options).c_str(),
            reinterpret_cast<const void*>(lstm_cell_forward_kernel<T, P>));
      visit(context, ("lstm_cell_backward<" + dtype + options).c_str(),
            reinterpret_cast<const void*>(lstm_cell_backward_kernel<T, P>));
    };
    add(std::integral_constant<int, kPack<T>>{}, ", 16 bytes per thread>");
    add(std::integral_constant<int, 1>{}, ", one unit per thread>");
  });
}

}  // namespace seqkern::cuda
