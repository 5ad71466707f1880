// The LSTM backward with launches per step, from the last to the first: for what the resident
// kernel (lstm_backward.cu) does not do.
#include "common/host_device.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/lstm.cuh"
#include "cuda/recurrent_steps.cuh"

namespace seqkern::cuda {
namespace {

// The gradients between launches, in the workspace, in the accumulator type.
template <class T>
struct Carried {
  using Acc = AccOf<T>;
  Carried(const LstmInputs& in, void* workspace)
      : dh(static_cast<Acc*>(workspace)), dc(dh + in.r.B * in.r.P), dm(dc + in.r.B * in.r.H) {}
  static int64_t bytes(const LstmInputs& in) {
    return in.r.B * (in.r.P + in.r.H * (in.w_hr ? 2 : 1)) * static_cast<int64_t>(sizeof(Acc));
  }
  Acc* dh;  // [B, P] of h_{t-1}, through dgates_t
  Acc* dc;  // [B, H] of c_{t-1}
  Acc* dm;  // [B, H] of m_t, with a projection only
};

// Whole gradient at h_t, with a projection.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    lstm_step_dh_kernel(const __grid_constant__ LstmBackwardArgs a, Carried<T> carried, int64_t s) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.in.r;
  const int64_t n = step_thread();
  if (n >= r.B * r.P) return;
  const int64_t b = n / r.P, L = length_of(r, b);
  if (s >= L) {
    store_at<T>(a.dh_total, s * r.B * r.P + n, Acc(0));
    return;
  }
  const int64_t t = time_of(r, L, s);
  const Acc dh = s == L - 1 ? load_or_zero<T>(a.dh_n, n) : carried.dh[n];
  store_at<T>(a.dh_total, t * r.B * r.P + n,
              dh + load_or_zero<T>(a.dh, t * a.dh_strides.t + b * a.dh_strides.b + n % r.P));
}

// dgates of the step, and with a projection m.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 4)
    lstm_step_dgates_kernel(const __grid_constant__ LstmBackwardArgs a, Carried<T> carried,
                            int64_t s) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.in.r;
  const int64_t n = step_thread();
  if (n >= r.B * r.H) return;
  const int64_t b = n / r.H, j = n % r.H, L = length_of(r, b);
  if (s == 0 && L == 0 && a.dgates_0) {
#pragma unroll
    for (int q = 0; q < 4; ++q) store_at<T>(a.dgates_0, (4 * b + q) * r.H + j, Acc(0));
  }
  if (s >= L) {
    zero_dgates<T>(a, s, b, j);
    if (a.in.w_hr) store_at<T>(a.m, s * r.B * r.H + n, Acc(0));
    return;
  }
  const int64_t t = time_of(r, L, s);
  SavedStep<T> step;
  const BackwardOffsets at(a, L, s, b, j);
  step.load(a, at, s, b, j);
  Acc gates[4];
  step.gates(a, gates);
  const bool last = s == L - 1;
  Acc dc = (last ? load_or_zero<T>(a.dc_n, n) : carried.dc[n]) + step.grad_c.value();
  Acc dm;
  if (a.in.w_hr) {
    dm = carried.dm[n];
    store_at<T>(a.m, t * r.B * r.H + n, gates[3] * tanh_of(step.after.value()));
  } else {
    dm = (last ? load_or_zero<T>(a.dh_n, n) : carried.dh[n]) + step.grad_h.value();
  }
  Acc d[4];
  cell_backward(gates, step.before.value(), step.after.value(), dm, dc, d);
  carried.dc[n] = dc;
  save_dgates<T>(a, at, s, b, j, d);
}

// Gradients of the initial state: what step 0 left, or what came from outside where no step was.
template <class T>
__global__ void __launch_bounds__(kStepThreads)
    lstm_steps_end_kernel(const __grid_constant__ LstmBackwardArgs a, Carried<T> carried) {
  const RecurrentInputs& r = a.in.r;
  const int64_t n = step_thread();
  if (a.dh0 && n < r.B * r.P) {
    const bool any = length_of(r, n / r.P) > 0;
    store_at<T>(a.dh0, n, any ? carried.dh[n] : load_or_zero<T>(a.dh_n, n));
  }
  if (a.dc0 && n < r.B * r.H) {
    const bool any = length_of(r, n / r.H) > 0;
    store_at<T>(a.dc0, n, any ? carried.dc[n] : load_or_zero<T>(a.dc_n, n));
  }
}

}  // namespace

// ---------------------------------------------------------------- launching

int64_t lstm_backward_steps_workspace(const LstmBackwardArgs& a) {
  return dispatch_dtype(
      a.in.r.dtype, [&](auto tag) { return Carried<typename decltype(tag)::type>::bytes(a.in); });
}

void lstm_backward_steps(const LstmBackwardArgs& a, cudaStream_t stream) {
  dispatch_dtype(a.in.r.dtype, [&]<class T>(TypeTag<T>) {
    const RecurrentInputs& r = a.in.r;
    const Carried<T> carried(a.in, a.workspace);
    const auto config = [&](int64_t blocks) {
      return LaunchConfig{.name = "lstm_backward",
                          .grid = static_cast<unsigned>(blocks),
                          .block = kStepThreads,
                          .stream = stream};
    };
    const auto elements = [&](int64_t n) {
      return config(ceil_div<int64_t>(r.B * n, kStepThreads));
    };
    const auto product = [&](const void* v, const void* w, AccOf<T>* out, int64_t J, int64_t K,
                             int64_t s) {
      launch(step_product_kernel<T>, config(step_product_blocks(K, r.B)), r,
             static_cast<const T*>(v), SequenceStrides{r.B * J, J}, static_cast<const T*>(w), out,
             J, K, s);
    };
    for (int64_t s = r.T - 1; s >= 0; --s) {
      if (a.in.w_hr) {
        launch(lstm_step_dh_kernel<T>, elements(r.P), a, carried, s);
        product(a.dh_total, a.in.w_hr, carried.dm, r.P, r.H, s);
      }
      launch(lstm_step_dgates_kernel<T>, elements(r.H), a, carried, s);
      if (s > 0 || a.dh0) product(a.dgates, r.w_hh, carried.dh, 4 * r.H, r.P, s);
    }
    if (a.dh0 || a.dc0) launch(lstm_steps_end_kernel<T>, elements(max(r.H, r.P)), a, carried);
  });
}

void visit_lstm_steps_backward_kernels(VisitKernel visit, void* context) {
  for_each_float_type([&]<class T>(TypeTag<T>, const std::string& dtype) {
    const auto add = [&](const char* name, auto kernel) {
      visit(context, (name + ("<" + dtype + ">")).c_str(), reinterpret_cast<const void*>(kernel));
    };
    add("lstm_step_dh", lstm_step_dh_kernel<T>);
    add("lstm_step_dgates", lstm_step_dgates_kernel<T>);
    add("step_product", step_product_kernel<T>);
    add("lstm_steps_end", lstm_steps_end_kernel<T>);
  });
}

}  // namespace seqkern::cuda
