// The LSTM forward with one launch per step (two with a projection): for what the resident kernel
// (lstm.cu) does not do. The recurrent product and the pointwise part are one kernel; the order of
// launches is the only synchronisation.
#include "common/host_device.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/lstm.cuh"
#include "cuda/recurrent_steps.cuh"

namespace seqkern::cuda {
namespace {

// The state between launches, in the workspace. h is in two copies, since the blocks of a step read
// all of the earlier one while they write the next.
template <class T>
struct State {
  using Acc = AccOf<T>;
  State(const LstmInputs& in, void* workspace)
      : c(static_cast<Acc*>(workspace)),
        m(c + in.r.B * in.r.H),
        h(reinterpret_cast<T*>(m + (in.w_hr ? in.r.B * in.r.H : 0))) {}
  static int64_t bytes(const LstmInputs& in) {
    const RecurrentInputs& r = in.r;
    return r.B * (r.H * (in.w_hr ? 2 : 1) * static_cast<int64_t>(sizeof(Acc)) +
                  2 * r.P * static_cast<int64_t>(sizeof(T)));
  }
  Acc* c;  // [B, H]
  Acc* m;  // [B, H], with a projection only
  T* h;    // [2, B, P]
};

template <class T>
__device__ __forceinline__ void write_h(const LstmForwardArgs& a, const State<T>& state, int64_t L,
                                        int64_t s, int64_t b, int64_t j, AccOf<T> h) {
  const RecurrentInputs& r = a.in.r;
  store_at<T>(a.h, time_of(r, L, s) * a.h_strides.t + b * a.h_strides.b + j, h);
  store1(state.h + ((s + 1) % 2 * r.B + b) * r.P + j, h);
  if (s == L - 1) store_at<T>(a.h_n, b * r.P + j, h);
}

// At a time without a step: zero, and before the first step of a row without any, its last state.
template <class T>
__device__ __forceinline__ void skip_h(const LstmForwardArgs& a, int64_t L, int64_t s, int64_t b,
                                       int64_t j) {
  const RecurrentInputs& r = a.in.r;
  store_at<T>(a.h, s * a.h_strides.t + b * a.h_strides.b + j, AccOf<T>(0));
  if (s == 0 && L == 0) store_at<T>(a.h_n, b * r.P + j, load_or_zero<T>(r.h0, b * r.P + j));
}

template <class T>
__global__ void __launch_bounds__(kStepWarps* kWarp)
    lstm_step_kernel(const __grid_constant__ LstmForwardArgs a, State<T> state, int64_t s) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.in.r;
  const StepTask task(r.H, r.B);
  if (task.j >= r.H) return;  // whole warps leave
  const T* w = static_cast<const T*>(r.w_hh) + task.j * r.P;
  const int64_t gate = r.H * r.P;
  const T* h = s > 0 ? state.h + s % 2 * r.B * r.P : static_cast<const T*>(r.h0);
  Acc gates[4] = {};
  const auto rows = [&](int64_t b) { return h && s < length_of(r, b) ? h + b * r.P : nullptr; };
  step_products<4>({w, w + gate, w + 2 * gate, w + 3 * gate}, rows, r.P, task, gates);

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane >= task.rows) return;
  const int64_t b = task.b + lane, j = task.j, n = b * r.H + j;
  const int64_t L = length_of(r, b);
  if (s >= L) {
    if (a.c) store_at<T>(a.c, s * r.B * r.H + n, Acc(0));
    if (s == 0) store_at<T>(a.c_n, n, load_or_zero<T>(a.in.c0, n));
    if (!a.in.w_hr) skip_h<T>(a, L, s, b, j);
    return;
  }
  const StepOffsets at(a, time_of(r, L, s), b, j);
  GateInputs<T> x;
  x.load(a, at);
  GateBias<T> bias;
  bias.load(r, j);
  x.add_to(gates, bias);
  Acc c = s > 0 ? state.c[n] : load_or_zero<T>(a.in.c0, n);
  const Acc m = cell_forward(gates, c);
  state.c[n] = c;
  save_step<T>(a, at, gates, c);
  if (s == L - 1) store_at<T>(a.c_n, n, c);
  if (a.in.w_hr) {
    state.m[n] = m;
  } else {
    write_h(a, state, L, s, b, j, m);
  }
}

// h = w_hr m.
template <class T>
__global__ void __launch_bounds__(kStepWarps* kWarp)
    lstm_step_projection_kernel(const __grid_constant__ LstmForwardArgs a, State<T> state,
                                int64_t s) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.in.r;
  const StepTask task(r.P, r.B);
  if (task.j >= r.P) return;
  Acc h[1] = {};
  const auto rows = [&](int64_t b) { return s < length_of(r, b) ? state.m + b * r.H : nullptr; };
  step_products<1>({static_cast<const T*>(a.in.w_hr) + task.j * r.H}, rows, r.H, task, h);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane >= task.rows) return;
  const int64_t b = task.b + lane, L = length_of(r, b);
  if (s < L) {
    write_h(a, state, L, s, b, task.j, h[0]);
  } else {
    skip_h<T>(a, L, s, b, task.j);
  }
}

}  // namespace

// ---------------------------------------------------------------- launching

int64_t lstm_forward_steps_workspace(const LstmForwardArgs& a) {
  return dispatch_dtype(a.in.r.dtype,
                        [&](auto tag) { return State<typename decltype(tag)::type>::bytes(a.in); });
}

void lstm_forward_steps(const LstmForwardArgs& a, cudaStream_t stream) {
  dispatch_dtype(a.in.r.dtype, [&]<class T>(TypeTag<T>) {
    const RecurrentInputs& r = a.in.r;
    const State<T> state(a.in, a.workspace);
    LaunchConfig config{.name = "lstm", .block = kStepWarps * kWarp, .stream = stream};
    for (int64_t s = 0; s < r.T; ++s) {
      config.grid = step_blocks(r.H, r.B);
      launch(lstm_step_kernel<T>, config, a, state, s);
      if (!a.in.w_hr) continue;
      config.grid = step_blocks(r.P, r.B);
      launch(lstm_step_projection_kernel<T>, config, a, state, s);
    }
  });
}

void visit_lstm_steps_kernels(VisitKernel visit, void* context) {
  for_each_float_type([&]<class T>(TypeTag<T>, const std::string& dtype) {
    visit(context, ("lstm_step<" + dtype + ">").c_str(),
          reinterpret_cast<const void*>(lstm_step_kernel<T>));
    visit(context, ("lstm_step_projection<" + dtype + ">").c_str(),
          reinterpret_cast<const void*>(lstm_step_projection_kernel<T>));
  });
}

}  // namespace seqkern::cuda
