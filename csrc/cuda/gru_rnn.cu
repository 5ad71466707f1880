// The GRU and the RNN forward on CUDA: one cooperative launch for all steps, recurrent weights
// resident (resident.cuh); where that cannot be, one launch per step (gru_rnn_steps.cu).
#include "cuda/gru_rnn.cuh"
#include "cuda/kernels.h"
#include "cuda/resident.cuh"

namespace seqkern::cuda {
namespace {

template <class T, bool kGru>
__global__ void __launch_bounds__(kProductThreads, 1)
    hidden_resident_kernel(const __grid_constant__ HiddenForwardArgs a,
                           const __grid_constant__ ResidentPlan plan, int64_t first_row) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = a.r;
  Resident<ForwardProduct<T>> block(plan, r, a.workspace, first_row);
  typename Resident<ForwardProduct<T>>::Held held;
  block.load_weights(held);
  // The state of a cell is its own h, which a GRU's next step reads past the product.
  block.for_each_cell([&](const Cell& cell, Acc& h) {
    const int64_t n = cell.b * r.H + cell.unit, L = cell.L;
    h = load_or_zero<T>(r.h0, n);
    for (int64_t t = L; t < r.T; ++t) store_at<T>(a.h, t * r.B * r.H + n, Acc(0));
    if (L == 0) store_at<T>(a.h_n, n, h);
  });
  block.start([&](int64_t b, int unit) { return load_or_zero<T>(r.h0, b * r.H + unit); });

  const int steps = block.steps();
  for (int s = 0; s < steps; ++s) {
    for (int pass = 0; pass < block.passes(); ++pass) {
      for (int set = 0; set < block.sets(); ++set) {
        const Cell cell = block.cell(pass, set);
        const int64_t L = cell.L;
        const bool active = s < L;
        const int64_t t = time_of(r, L, s);
        // Under way while the warp waits.
        UnitInputs<T, kGru> x;
        if (active) x.load(a, t, cell.b, cell.unit);
        block.multiply(held, pass, set, s);
        // Orders the warps' partials before the sums, and all reads of the exchange before this
        // round's writes.
        __syncthreads();
        GruGates<Acc> y = {};
        Acc& h = block.state(pass, set);
        if (active) {
          Acc products[kGates] = {};
          block.total(cell, products);
          h = rounded<T>(next_h(a, x, products, h, y));
          block.exchange(cell, pass, {h}, s);
        }
        // Orders the sums before the next partials, and the exchange before the flag.
        __syncthreads();
        if (set == block.sets() - 1) block.publish(pass, s);
        // The flag does not wait for these.
        if (active) {
          save_gates<T, kGru>(a, t, cell.b, cell.unit, y);
          store_at<T>(a.h, (t * r.B + cell.b) * r.H + cell.unit, h);
          if (s == L - 1) store_at<T>(a.h_n, cell.b * r.H + cell.unit, h);
        }
      }
    }
  }
}

template <class T>
ResidentPlan plan_of(const HiddenForwardArgs& a) {
  return plan_resident<ForwardProduct<T>>(a.r, current_device(),
                                          static_cast<int>(gates_of(a.cell)));
}

}  // namespace

// ---------------------------------------------------------------- launching

int64_t hidden_forward_workspace(const HiddenForwardArgs& a) {
  return dispatch_dtype(a.r.dtype, [&]<class T>(TypeTag<T>) { return plan_of<T>(a).bytes; });
}

void hidden_forward(const HiddenForwardArgs& a, Stream stream) {
  dispatch_cell(a.r.dtype, a.cell, [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>) {
    const ResidentPlan plan = plan_of<T>(a);
    if (plan.blocks() == 0) {
      hidden_forward_steps(a, stream);
      return;
    }
    launch_resident(kGru ? "gru" : "rnn", hidden_resident_kernel<T, kGru>, a, plan, a.r.B, stream);
  });
}

void visit_gru_rnn_kernels(VisitKernel visit, void* context) {
  for_each_cell_type(
      [&]<class T, bool kGru>(TypeTag<T>, std::bool_constant<kGru>, const std::string& of) {
        visit(context, ("hidden_resident" + of).c_str(),
              reinterpret_cast<const void*>(hidden_resident_kernel<T, kGru>));
      });
}

}  // namespace seqkern::cuda
