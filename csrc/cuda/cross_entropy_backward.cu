// Softmax-cross-entropy on CUDA, backward: one read of the logits, one write of their gradient.
// Apart from the forward so that the two compile at once.
#include "cuda/cross_entropy.cuh"

namespace seqkern::cuda {
namespace {

// Packs whose gradients are made at once: more would not fit in registers.
constexpr int kTogether = 1;

// dx_v = scale * p_v - g_ce w_v q_v with p_v = exp((x_v - m) - log_sum), times the cap's
// derivative.
template <class T, bool kTargetSums, class Group>
__global__ void __launch_bounds__(Group::kMaxThreads, kBlocksAtOnce<T, Group>)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyBackwardArgs a) {
  using Acc = AccOf<T>;
  const CrossEntropyInputs& in = a.in;
  const Group group;
  const int64_t n = group.row();
  if (n >= in.N) return;  // whole groups leave, so no reduction waits for them
  const int V = static_cast<int>(in.V);
  const T* x_n = static_cast<const T*>(in.logits) + in.logits_rows.offset(n);
  prefetch_row<kUnroll<T, kTargetSums>>(x_n, V, group);
  const Target y(in.target, in.ignore_index, in.V, n);
  const Acc* grad_loss = static_cast<const Acc*>(a.grad_loss);
  const Acc* norm = static_cast<const Acc*>(a.norm);
  // Asked for before any of it is looked at: a round trip to memory for all.
  const Acc g_row = grad_loss ? grad_loss[n * a.grad_loss_stride] : Acc(0);
  const Acc norm_ce = norm ? norm[0] : Acc(1);
  const Acc norm_z = norm ? norm[1] : Acc(1);
  const Acc g_lse = a.grad_lse ? static_cast<const Acc*>(a.grad_lse)[n] : Acc(0);
  const Acc m = static_cast<const Acc*>(a.row_max)[n];
  const Acc log_sum = static_cast<const Acc*>(a.row_log_sum)[n];
  const Acc g = y.ignored ? Acc(0) : g_row;
  // Nothing flows where g is 0, even where the norm is infinite (all rows ignored).
  const Acc g_ce = g == 0 ? Acc(0) : g * norm_ce;
  const Acc g_z = g == 0 ? Acc(0) : g * norm_z;
  T* dx_n = static_cast<T*>(a.dlogits) + n * V;

  if (y.ignored && g_lse == 0) {
    // The row's own split for the stores; what is loaded is not used, and the compiler drops the
    // loads.
    for_each_in_row<kUnroll<T, kTargetSums>, kTogether>(
        dx_n, V, group, [&]<int U, int P>(int v, int step, Acc(&)[U][P]) {
          const Acc zero[P] = {};
#pragma unroll
          for (int u = 0; u < U; ++u) store_run(dx_n + v + u * step, zero);
        });
    return;
  }

  const Options<Acc> o(in);
  const T* p_n = in.target_probs
                     ? static_cast<const T*>(in.target_probs) + in.target_probs_rows.offset(n)
                     : nullptr;
  Acc on_target = y.v >= 0 ? g_ce * o.keep * o.weight_of(y.v) : Acc(0);
  if (y.invalid) on_target = quiet_nan<Acc>();
  Acc mass = 0;
  if (in.target) {
    const Acc* weight_sum = static_cast<const Acc*>(in.weight_sum);
    mass = o.uniform * (weight_sum ? *weight_sum : static_cast<Acc>(in.V));
  }
  if constexpr (kTargetSums) {
    if (p_n) {
      for_each_in_row<kUnroll<T, kTargetSums>, kTogether>(
          p_n, V, group, [&]<int U, int P>(int v, int step, Acc(&)[U][P]) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
              Acc q[P];
              target_weights(o, p_n, v + u * step, q);
#pragma unroll
              for (int i = 0; i < P; ++i) mass += q[i];
            }
          });
      mass = group.reduce(mass, Acc(0), Add<Acc>{});
    }
  }
  const Acc z = o.z_loss == 0 ? Acc(0) : g_z * 2 * o.z_loss * (m + log_sum);
  const Acc rest = g_ce * mass + z + g_lse;
  const Acc scale = on_target + rest;

  for_each_in_row<kUnroll<T, kTargetSums>, kTogether>(
      x_n, V, group, [&]<int U, int P>(int v0, int step, Acc(&x)[U][P]) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int v = v0 + u * step;
          Acc cap_derivative[P] = {};
          if (o.softcap > 0) {
#pragma unroll
            for (int i = 0; i < P; ++i) {
              cap_derivative[i] = tanh_derivative(x[u][i] * o.inverse_cap);
              x[u][i] = o.cap(x[u][i]);
            }
          }
          Acc d[P];
#pragma unroll
          for (int i = 0; i < P; ++i) d[i] = softmax_exp((x[u][i] - m) - log_sum) * scale;
          if (static_cast<unsigned>(y.v - v) < static_cast<unsigned>(P) && on_target != 0) {
        // p_y - 1 as expm1: exact where the model is sure, which is where the subtraction would
        // cancel.
#pragma unroll
            for (int i = 0; i < P; ++i) {
              if (v + i == y.v) {
                const Acc log_p = (x[u][i] - m) - log_sum;
                d[i] = on_target * expm1_of(log_p) + rest * softmax_exp(log_p);
              }
            }
          }
          if constexpr (kTargetSums) {
            Acc q[P];
            target_weights(o, p_n, v, q);
#pragma unroll
            for (int i = 0; i < P; ++i) d[i] -= q[i] * g_ce;
          }
          if (o.softcap > 0) {
#pragma unroll
            for (int i = 0; i < P; ++i) d[i] *= cap_derivative[i];
          }
          store_run(dx_n + v, d);
        }
      });
}

}  // namespace

// ---------------------------------------------------------------- launcher

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, Stream stream) {
  specialize(a.in, [&]<class T, class Sums, class Group>(TypeTag<T>, Sums, TypeTag<Group>) {
    launch(cross_entropy_backward_kernel<T, Sums::value, Group>,
           config_of<T, Group>("cross_entropy_backward", a.in, stream), a);
  });
}

void visit_cross_entropy_backward_kernels(VisitKernel visit, void* context) {
  for_each_specialization([&]<class T, class Sums, class Group>(TypeTag<T>, Sums, TypeTag<Group>,
                                                                const std::string& options) {
    visit(context, ("cross_entropy_backward" + options).c_str(),
          reinterpret_cast<const void*>(cross_entropy_backward_kernel<T, Sums::value, Group>));
  });
}

}  // namespace seqkern::cuda
