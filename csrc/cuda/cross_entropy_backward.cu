// Softmax-cross-entropy on CUDA, backward: one read of the logits, one write of their gradient.
// Apart from the forward so that the two compile at once.
#include "cuda/cross_entropy.cuh"

namespace seqkern::cuda {
namespace {

// Packs whose gradients are made at once: more would not fit in registers.
constexpr int kTogether = 1;

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
  RowGradient<Acc> row(a, y, n);
  T* dx_n = static_cast<T*>(a.dlogits) + n * V;

  if (y.ignored && row.g_lse == 0) {
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
  Acc mass = smoothing_mass(in, o);
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
  row.finish(o, y, mass);

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
          for (int i = 0; i < P; ++i) d[i] = row.of(x[u][i]);
          if (static_cast<unsigned>(y.v - v) < static_cast<unsigned>(P) && row.on_target != 0) {
#pragma unroll
            for (int i = 0; i < P; ++i) {
              if (v + i == y.v) d[i] = row.of_class(x[u][i]);
            }
          }
          if constexpr (kTargetSums) {
            Acc q[P];
            target_weights(o, p_n, v, q);
#pragma unroll
            for (int i = 0; i < P; ++i) d[i] -= q[i] * row.g_ce;
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
  if (a.in.side) return backward_columns(a, stream);
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
