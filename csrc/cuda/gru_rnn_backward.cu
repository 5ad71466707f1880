// The GRU and the RNN backward on CUDA: one cooperative launch for all steps with the transposed
// recurrent weights resident, as forward. What is exchanged are the gradients at the recurrent
// products; those of weights and inputs are products over the whole sequence, made by the torch
// layer.
#include "cuda/gru_rnn.cuh"
#include "cuda/kernels.h"
#include "cuda/resident.cuh"

namespace seqkern::cuda {
namespace {

template <class T, bool kGru>
__global__ void __launch_bounds__(kProductThreads, 1)
    hidden_resident_backward_kernel(const __grid_constant__ HiddenBackwardArgs a,
                                    const __grid_constant__ ResidentPlan plan, int64_t first_row) {
  using Acc = AccOf<T>;
  constexpr int G = kGru ? 3 : 1;
  const RecurrentInputs& r = a.r;
  Resident<BackwardProduct<T>> block(plan, r, a.workspace, first_row);
  typename Resident<BackwardProduct<T>>::Held held;
  block.load_weights(held);
  // The state of a cell is the part of dh that goes past the gates.
  block.for_each_cell([&](const Cell& cell, Acc& past) {
    past = 0;
    for (int64_t t = cell.L; t < r.T; ++t) {
      zero_gradients<T, kGru>(a, t, cell.b, cell.unit);
    }
  });
  // A row takes part from its last step on; before, its gradients are these zeros.
  block.start([](int64_t, int) { return Acc(0); });

  const int steps = block.steps();
  // One more round than steps, for the gradient of h0.
  for (int round = 0; round < steps + (a.dh0 ? 1 : 0); ++round) {
    const int s = steps - 1 - round;
    for (int pass = 0; pass < block.passes(); ++pass) {
      for (int set = 0; set < block.sets(); ++set) {
        const Cell cell = block.cell(pass, set);
        const int64_t n = cell.b * r.H + cell.unit;
        const int64_t L = cell.L;
        const bool active = s >= 0 && s < L;
        // Under way while the warp waits.
        SavedUnit<T, kGru> unit;
        if (active) unit.load(a, L, s, cell.b, cell.unit);
        block.multiply(held, pass, set, round);
        // Orders the warps' partials before the sums, and all reads of the exchange before this
        // round's writes.
        __syncthreads();
        UnitGradients<Acc> d = {};
        Acc& past = block.state(pass, set);
        if (active || (s < 0 && cell.valid)) {
          // Through the steps after this one.
          Acc dh = s >= L - 1 ? load_or_zero<T>(a.dh_n, n) : block.total(cell) + past;
          if (active) {
            d = unit.gradients(a, dh);
            past = dh;
            Acc recurrent[G];
#pragma unroll
            for (int q = 0; q < G; ++q) recurrent[q] = d.recurrent(q);
            block.exchange(cell, pass, recurrent, round);
          } else {
            store_at<T>(a.dh0, n, dh);
          }
        }
        // Orders the sums before the next partials, and the exchange before the flag.
        __syncthreads();
        if (set == block.sets() - 1) block.publish(pass, round);
        // The flag does not wait for these.
        if (active) save_gradients<T, kGru>(a, time_of(r, L, s), s, cell.b, cell.unit, d);
      }
    }
  }
}

template <class T>
ResidentPlan plan_of(const HiddenBackwardArgs& a) {
  return plan_resident<BackwardProduct<T>>(a.r, current_device(),
                                           static_cast<int>(gates_of(a.cell)));
}

}  // namespace

// ---------------------------------------------------------------- launching

int64_t hidden_backward_workspace(const HiddenBackwardArgs& a) {
  return dispatch_dtype(a.r.dtype, [&]<class T>(TypeTag<T>) {
    const ResidentPlan plan = plan_of<T>(a);
    return plan.blocks() > 0 ? plan.bytes : hidden_backward_steps_workspace(a);
  });
}

void hidden_backward(const HiddenBackwardArgs& a, Stream stream) {
  dispatch_cell(a.r.dtype, a.cell, [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>) {
    const ResidentPlan plan = plan_of<T>(a);
    if (plan.blocks() == 0) {
      hidden_backward_steps(a, stream);
      return;
    }
    launch_resident(kGru ? "gru_backward" : "rnn_backward",
                    hidden_resident_backward_kernel<T, kGru>, a, plan, a.r.B, stream);
  });
}

void visit_gru_rnn_backward_kernels(VisitKernel visit, void* context) {
  for_each_cell_type(
      [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>, const std::string& of) {
        visit(context, ("hidden_resident_backward" + of).c_str(),
              reinterpret_cast<const void*>(hidden_resident_backward_kernel<T, kGru>));
      });
}

}  // namespace seqkern::cuda
