// The LSTM forward on CUDA: one cooperative launch for all steps, recurrent weights resident
// (resident.cuh), for every H and B; with a projection, one launch per step (lstm_steps.cu).
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/errors.h"
#include "cuda/kernels.h"
#include "cuda/lstm.cuh"
#include "cuda/resident.cuh"

namespace seqkern::cuda {
namespace {

// gates_x is brought to L2 so many steps before it is loaded. A warp waits for its loads and for h
// at once, so memory, which takes about as long as a step, would delay h.
constexpr int kStepsAhead = 2;

template <class T, class Exchange, bool kOne = false>
__global__ void __launch_bounds__(kProductThreads, 1)
    lstm_resident_kernel(const __grid_constant__ LstmForwardArgs a,
                         const __grid_constant__ ResidentPlan plan, int64_t first_row) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.in.r;
  using Block = Resident<ForwardProduct<T>, Exchange, kOne>;
  Block block(plan, r, a.workspace, first_row);
  typename Block::Held held;
  block.load_weights(held);
  block.for_each_cell([&](const Cell& cell, Acc& c) {
    const int64_t n = cell.b * r.H + cell.unit, L = cell.L;
    c = load_or_zero<T>(a.in.c0, n);
    for (int64_t t = L; t < r.T; ++t) {
      store_at<T>(a.h, t * a.h_strides.t + cell.b * a.h_strides.b + cell.unit, Acc(0));
      if (a.c) store_at<T>(a.c, t * r.B * r.H + n, Acc(0));
    }
    if (L == 0) {
      store_at<T>(a.c_n, n, c);
      store_at<T>(a.h_n, n, load_or_zero<T>(r.h0, n));
    }
  });
  block.start([&](int64_t b, int unit) { return load_or_zero<T>(r.h0, b * r.H + unit); });

  const int steps = block.steps();
  // Of the step under way; with kOne computed here, for all.
  StepOffsets at;
  GateBias<T> bias;
  if constexpr (kOne) {
    const Cell cell = block.cell(0, 0);
    at = StepOffsets(a, time_of(r, cell.L, 0), cell.b, cell.unit);
    if (cell.valid) bias.load(r, cell.unit);
  }
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    for (int pass = 0; pass < block.passes(); ++pass) {
      for (int set = 0; set < block.sets(); ++set) {
        const Cell cell = block.cell(pass, set);
        const int64_t L = cell.L;
        const bool active = s < L;
        if constexpr (!kOne) {
          at = StepOffsets(a, time_of(r, L, s), cell.b, cell.unit);
          bias = {};
          if (active) bias.load(r, cell.unit);
        }
        // Under way while the warp waits.
        GateInputs<T> x;
        if (active) x.load(a, at);
        if (s + kStepsAhead < L) GateInputs<T>::prefetch(a, at, kStepsAhead);
        T* const place = block.h_place(cell, pass, s);
        block.multiply(held, pass, set, s);
        // Orders the warps' partials before the sums, and all reads of the exchange before this
        // round's writes.
        __syncthreads();
        Acc gates[4] = {}, h = 0;
        bool nan = false;
        Acc& c = block.state(pass, set);
        if (active) {
          block.total(cell, gates);
          x.add_to(gates, bias);
          h = cell_forward(gates, c);
          nan = is_nan(c) || is_nan(gates[3]);
        }
        block.exchange_h(cell, pass, place, active, h, nan, s);
        // Orders the sums before the next partials, and the exchange before the flag.
        __syncthreads();
        if (set == block.sets() - 1) block.publish(pass, s);
        // The flag does not wait for these.
        if (active) {
          save_step<T>(a, at, gates, c);
          store_at<T>(a.h, at.h, h);
          if (s == L - 1) {
            store_at<T>(a.h_n, cell.b * r.H + cell.unit, h);
            store_at<T>(a.c_n, cell.b * r.H + cell.unit, c);
          }
        }
        if constexpr (kOne) at.advance(a);
      }
    }
  }
}

// SEQKERN_LSTM_EXCHANGE=flags|values, for comparing the two ways where both are (16 bits): asked at
// every call, so that a process can have one after the other.
bool by_values() {
  const char* asked = std::getenv("SEQKERN_LSTM_EXCHANGE");
  if (!asked || !*asked || !std::strcmp(asked, "values")) return true;
  if (!std::strcmp(asked, "flags")) return false;
  throw_value_error("SEQKERN_LSTM_EXCHANGE must be flags or values, got '" + std::string(asked) +
                    "'");
}

// Of types that have both ways, one for both: a workspace is made before the way is chosen.
template <class T>
ResidentPlan plan_of(const LstmForwardArgs& a) {
  if (a.in.w_hr) return {};
  constexpr int kBuffers = sizeof(T) == 2 ? ByValues::kBuffers : ByFlags::kBuffers;
  return plan_resident<ForwardProduct<T>>(a.in.r, current_device(), kGates, kBuffers);
}

}  // namespace

// ---------------------------------------------------------------- launching

int64_t lstm_forward_workspace(const LstmForwardArgs& a) {
  return dispatch_dtype(a.in.r.dtype, [&]<class T>(TypeTag<T>) {
    const ResidentPlan plan = plan_of<T>(a);
    return plan.blocks() > 0 ? plan.bytes : lstm_forward_steps_workspace(a);
  });
}

void lstm_forward(const LstmForwardArgs& a, Stream stream) {
  dispatch_dtype(a.in.r.dtype, [&]<class T>(TypeTag<T>) {
    const ResidentPlan plan = plan_of<T>(a);
    if (plan.blocks() == 0) {
      lstm_forward_steps(a, stream);
      return;
    }
    auto* kernel = lstm_resident_kernel<T, ByFlags>;
    if constexpr (sizeof(T) == 2) {
      if (by_values()) {
        kernel = plan.is_one() ? lstm_resident_kernel<T, ByValues, true>
                               : lstm_resident_kernel<T, ByValues>;
      }
    }
    launch_resident("lstm", kernel, a, plan, a.in.r.B, stream);
  });
}

void visit_lstm_kernels(VisitKernel visit, void* context) {
  for_each_float_type([&]<class T>(TypeTag<T>, const std::string& dtype) {
    visit(context, ("lstm_resident<" + dtype + ">").c_str(),
          reinterpret_cast<const void*>(lstm_resident_kernel<T, ByFlags>));
    if constexpr (sizeof(T) == 2) {
      visit(context, ("lstm_resident_values<" + dtype + ">").c_str(),
            reinterpret_cast<const void*>(lstm_resident_kernel<T, ByValues>));
      visit(context, ("lstm_resident_values_one<" + dtype + ">").c_str(),
            reinterpret_cast<const void*>(lstm_resident_kernel<T, ByValues, true>));
    }
  });
}

}  // namespace seqkern::cuda
