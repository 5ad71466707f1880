// The GRU and the RNN with launches per step: for what the resident kernels (gru_rnn.cu,
// gru_rnn_backward.cu) do not do. The order of launches is the only synchronisation.
#include "cuda/gru_rnn.cuh"
#include "cuda/kernels.h"
#include "cuda/recurrent_steps.cuh"

namespace seqkern::cuda {
namespace {

// ---------------------------------------------------------------- forward

// The recurrent product and the pointwise part. h before is where the output of the step before is.
template <class T, bool kGru>
__global__ void __launch_bounds__(kStepWarps* kWarp, 4)
    hidden_step_kernel(const __grid_constant__ HiddenForwardArgs a, int64_t s) {
  using Acc = AccOf<T>;
  constexpr int G = kGru ? 3 : 1;
  const RecurrentInputs& r = a.r;
  const StepTask task(r.H, r.B);
  if (task.j >= r.H) return;  // whole warps leave
  const auto before = [&](int64_t b) -> const T* {
    if (s == 0) return r.h0 ? static_cast<const T*>(r.h0) + b * r.H : nullptr;
    const int64_t L = length_of(r, b);
    if (s >= L) return nullptr;
    return static_cast<const T*>(a.h) + (time_of(r, L, s - 1) * r.B + b) * r.H;
  };
  const T* w = static_cast<const T*>(r.w_hh) + task.j * r.H;
  Acc products[G] = {};
  if constexpr (kGru) {
    step_products<3>({w, w + r.H * r.H, w + 2 * r.H * r.H}, before, r.H, task, products);
  } else {
    step_products<1>({w}, before, r.H, task, products);
  }

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane >= task.rows) return;
  const int64_t b = task.b + lane, j = task.j, n = b * r.H + j;
  const int64_t L = length_of(r, b);
  if (s >= L) {
    store_at<T>(a.h, s * r.B * r.H + n, Acc(0));
    if (s == 0) store_at<T>(a.h_n, n, load_or_zero<T>(r.h0, n));
    return;
  }
  const int64_t t = time_of(r, L, s);
  UnitInputs<T, kGru> x;
  x.load(a, t, b, j);
  const T* h_before = before(b);
  GruGates<Acc> y = {};
  const Acc h = next_h(a, x, products, h_before ? load1(h_before + j) : Acc(0), y);
  save_gates<T, kGru>(a, t, b, j, y);
  store_at<T>(a.h, (t * r.B + b) * r.H + j, h);
  if (s == L - 1) store_at<T>(a.h_n, n, h);
}

// ---------------------------------------------------------------- backward

// Between launches, in the workspace.
template <class T>
struct Carried {
  using Acc = AccOf<T>;
  Carried(const HiddenBackwardArgs& a, void* workspace)
      : dh(static_cast<Acc*>(workspace)),
        past(dh + a.r.B * a.r.H),
        du(reinterpret_cast<T*>(past + a.r.B * a.r.H)) {}
  static int64_t bytes(const HiddenBackwardArgs& a) {
    return a.r.B * a.r.H *
           (2 * static_cast<int64_t>(sizeof(Acc)) +
            gates_of(a.cell) * static_cast<int64_t>(sizeof(T)));
  }
  Acc* dh;    // [B, H] gradient of h_{t-1} through the gates,
  Acc* past;  // [B, H] and past them
  T* du;      // [B, G H] gradient at the recurrent products
};

// Gradient of h before the row's step s through the steps from s on.
template <class T>
__device__ __forceinline__ AccOf<T> carried_dh(const HiddenBackwardArgs& a,
                                               const Carried<T>& carried, int64_t L, int64_t s,
                                               int64_t n) {
  return s >= L ? load_or_zero<T>(a.dh_n, n) : carried.dh[n] + carried.past[n];
}

// The gradients at the gates of the step.
template <class T, bool kGru>
__global__ void __launch_bounds__(kStepThreads)
    hidden_step_gradients_kernel(const __grid_constant__ HiddenBackwardArgs a, Carried<T> carried,
                                 int64_t s) {
  using Acc = AccOf<T>;
  constexpr int G = kGru ? 3 : 1;
  const RecurrentInputs& r = a.r;
  const int64_t n = step_thread();
  if (n >= r.B * r.H) return;
  const int64_t b = n / r.H, j = n % r.H, L = length_of(r, b);
  if (s >= L) {
    zero_gradients<T, kGru>(a, s, b, j);
    return;
  }
  SavedUnit<T, kGru> unit;
  unit.load(a, L, s, b, j);
  Acc dh = carried_dh(a, carried, L, s + 1, n);
  const UnitGradients<Acc> d = unit.gradients(a, dh);
  carried.past[n] = dh;
#pragma unroll
  for (int q = 0; q < G; ++q) store1(carried.du + (G * b + q) * r.H + j, d.recurrent(q));
  save_gradients<T, kGru>(a, time_of(r, L, s), s, b, j, d);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads)
    hidden_steps_end_kernel(const __grid_constant__ HiddenBackwardArgs a, Carried<T> carried) {
  const int64_t n = step_thread();
  if (n >= a.r.B * a.r.H) return;
  store_at<T>(a.dh0, n, carried_dh(a, carried, length_of(a.r, n / a.r.H), 0, n));
}

}  // namespace

// ---------------------------------------------------------------- launching

void hidden_forward_steps(const HiddenForwardArgs& a, cudaStream_t stream) {
  dispatch_cell(a.r.dtype, a.cell, [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>) {
    for (int64_t s = 0; s < a.r.T; ++s) {
      launch(hidden_step_kernel<T, kGru>,
             {.name = kGru ? "gru" : "rnn",
              .grid = step_blocks(a.r.H, a.r.B),
              .block = kStepWarps * kWarp,
              .stream = stream},
             a, s);
    }
  });
}

int64_t hidden_backward_steps_workspace(const HiddenBackwardArgs& a) {
  return dispatch_dtype(a.r.dtype,
                        [&](auto tag) { return Carried<typename decltype(tag)::type>::bytes(a); });
}

void hidden_backward_steps(const HiddenBackwardArgs& a, cudaStream_t stream) {
  dispatch_cell(a.r.dtype, a.cell, [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>) {
    const RecurrentInputs& r = a.r;
    const Carried<T> carried(a, a.workspace);
    const int64_t J = gates_of(a.cell) * r.H;
    LaunchConfig config{
        .name = kGru ? "gru_backward" : "rnn_backward", .block = kStepThreads, .stream = stream};
    const auto elements = static_cast<unsigned>(ceil_div<int64_t>(r.B * r.H, kStepThreads));
    for (int64_t s = r.T - 1; s >= 0; --s) {
      config.grid = elements;
      launch(hidden_step_gradients_kernel<T, kGru>, config, a, carried, s);
      if (s == 0 && !a.dh0) break;
      config.grid = static_cast<unsigned>(step_product_blocks(r.H, r.B));
      launch(step_product_kernel<T>, config, r, static_cast<const T*>(carried.du),
             SequenceStrides{0, J}, static_cast<const T*>(r.w_hh), carried.dh, J, r.H, s);
    }
    config.grid = elements;
    if (a.dh0) launch(hidden_steps_end_kernel<T>, config, a, carried);
  });
}

void visit_gru_rnn_steps_kernels(VisitKernel visit, void* context) {
  const auto add = [&](const std::string& name, auto kernel) {
    visit(context, name.c_str(), reinterpret_cast<const void*>(kernel));
  };
  for_each_cell_type(
      [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>, const std::string& of) {
        add("hidden_step" + of, hidden_step_kernel<T, kGru>);
        add("hidden_step_gradients" + of, hidden_step_gradients_kernel<T, kGru>);
      });
  for_each_float_type([&]<class T>(TypeTag<T>, const std::string& dtype) {
    add("hidden_steps_end<" + dtype + ">", hidden_steps_end_kernel<T>);
  });
}

}  // namespace seqkern::cuda
