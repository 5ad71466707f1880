// The LSTM backward on CUDA: one cooperative launch for all steps with the transposed recurrent
// weights resident, as forward. What is exchanged are dgates; the gradients of weights and inputs
// are products over the whole sequence, made by the torch layer.
#include "cuda/kernels.h"
#include "cuda/lstm.cuh"
#include "cuda/resident.cuh"

namespace seqkern::cuda {
namespace {

template <class T, bool kOne = false>
__global__ void __launch_bounds__(kProductThreads, 1)
    lstm_resident_backward_kernel(const __grid_constant__ LstmBackwardArgs a,
                                  const __grid_constant__ ResidentPlan plan, int64_t first_row) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.in.r;
  using Block = Resident<BackwardProduct<T>, ByFlags, kOne>;
  Block block(plan, r, a.workspace, first_row);
  typename Block::Held held;
  block.load_weights(held);
  block.for_each_cell([&](const Cell& cell, Acc& dc) {
    dc = load_or_zero<T>(a.dc_n, cell.b * r.H + cell.unit);
    const int64_t L = cell.L;
    for (int64_t t = L; t < r.T; ++t) zero_dgates<T>(a, t, cell.b, cell.unit);
    if (L == 0 && a.dgates_0) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        store_at<T>(a.dgates_0, (4 * cell.b + q) * r.H + cell.unit, Acc(0));
      }
    }
  });
  // A row takes part from its last step on; before, its dgates are these zeros.
  block.start([](int64_t, int) { return Acc(0); });

  const int steps = block.steps();
  BackwardOffsets at;  // of the step under way; with kOne, of the next one the cell has
  if constexpr (kOne) {
    const Cell cell = block.cell(0, 0);
    at = BackwardOffsets(a, cell.L, cell.L - 1, cell.b, cell.unit);
  }
  // One more round than steps, for the gradient of h0.
#pragma unroll 1
  for (int round = 0; round < steps + (a.dh0 ? 1 : 0); ++round) {
    const int s = steps - 1 - round;
    for (int pass = 0; pass < block.passes(); ++pass) {
      for (int set = 0; set < block.sets(); ++set) {
        const Cell cell = block.cell(pass, set);
        const int64_t n = cell.b * r.H + cell.unit;
        const int64_t L = cell.L;
        const bool active = s >= 0 && s < L;
        if constexpr (!kOne) at = BackwardOffsets(a, L, s, cell.b, cell.unit);
        // Under way while the warp waits.
        SavedStep<T> step;
        if (active) step.load(a, at, s, cell.b, cell.unit);
        block.multiply(held, pass, set, round);
        // Orders the warps' partials before the sums, and all reads of the exchange before this
        // round's writes.
        __syncthreads();
        Acc d[4] = {};
        if (active) {
          const Acc later =
              s == L - 1 ? load_or_zero<T>(a.dh_n, n) : block.total(cell);  // dh through t + 1
          Acc gates[4];
          step.gates(a, gates);
          Acc& dc = block.state(pass, set);
          dc += step.grad_c.value();
          cell_backward(gates, step.before.value(), step.after.value(), later + step.grad_h.value(),
                        dc, d);
          block.exchange(cell, pass, d, round);
        } else if (s < 0 && cell.valid) {
          store_at<T>(a.dh0, n, L > 0 ? block.total(cell) : load_or_zero<T>(a.dh_n, n));
        }
        // Orders the sums before the next partials, and the exchange before the flag.
        __syncthreads();
        if (set == block.sets() - 1) block.publish(pass, round);
        // The flag does not wait for these.
        if (active) {
          save_dgates<T>(a, at, s, cell.b, cell.unit, d);
          if constexpr (kOne) at.go_back(a);
        }
      }
    }
  }
  if (a.dc0) {
    block.for_each_cell(
        [&](const Cell& cell, Acc& dc) { store_at<T>(a.dc0, cell.b * r.H + cell.unit, dc); });
  }
}

template <class T>
ResidentPlan plan_of(const LstmBackwardArgs& a) {
  return a.in.w_hr ? ResidentPlan{} : plan_resident<BackwardProduct<T>>(a.in.r, current_device());
}

}  // namespace

// ---------------------------------------------------------------- launching

int64_t lstm_backward_workspace(const LstmBackwardArgs& a) {
  return dispatch_dtype(a.in.r.dtype, [&]<class T>(TypeTag<T>) {
    const ResidentPlan plan = plan_of<T>(a);
    return plan.blocks() > 0 ? plan.bytes : lstm_backward_steps_workspace(a);
  });
}

void lstm_backward(const LstmBackwardArgs& a, Stream stream) {
  dispatch_dtype(a.in.r.dtype, [&]<class T>(TypeTag<T>) {
    const ResidentPlan plan = plan_of<T>(a);
    if (plan.blocks() == 0) {
      lstm_backward_steps(a, stream);
      return;
    }
    auto* kernel = lstm_resident_backward_kernel<T>;
    if constexpr (sizeof(T) == 2) {
      if (plan.is_one()) kernel = lstm_resident_backward_kernel<T, true>;
    }
    launch_resident("lstm_backward", kernel, a, plan, a.in.r.B, stream);
  });
}

void visit_lstm_backward_kernels(VisitKernel visit, void* context) {
  for_each_float_type([&]<class T>(TypeTag<T>, const std::string& dtype) {
    visit(context, ("lstm_resident_backward<" + dtype + ">").c_str(),
          reinterpret_cast<const void*>(lstm_resident_backward_kernel<T>));
    if constexpr (sizeof(T) == 2) {
      visit(context, ("lstm_resident_backward_one<" + dtype + ">").c_str(),
            reinterpret_cast<const void*>(lstm_resident_backward_kernel<T, true>));
    }
  });
}

}  // namespace seqkern::cuda
