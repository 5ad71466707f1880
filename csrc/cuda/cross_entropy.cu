// Softmax-cross-entropy on CUDA, forward: the logits are read once. A warp takes a row that is
// short, a block one that is long (block.cuh: Group).
#include "cuda/cross_entropy.cuh"
#include "cuda/softmax.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kReduceThreads = 1024;

// ---------------------------------------------------------------- forward

template <class T, bool kTargetSums, class Group>
__global__ void __launch_bounds__(Group::kMaxThreads, kBlocksAtOnce<T, Group>)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyForwardArgs a) {
  using Acc = AccOf<T>;
  const CrossEntropyInputs& in = a.in;
  const Group group;
  const int64_t n = group.row();
  if (n >= in.N) return;  // whole groups leave, so no reduction waits for them
  const int V = static_cast<int>(in.V);
  const T* x_n = static_cast<const T*>(in.logits) + in.logits_rows.offset(n);
  prefetch_row<kUnroll<T, kTargetSums>>(x_n, V, group);
  const Target y(in.target, in.ignore_index, in.V, n);
  if (y.ignored && !a.lse) {
    if (group.rank() == 0) skip_row<Acc>(a, n);
    return;
  }

  const Options<Acc> o(in);
  const T* p_n = in.target_probs
                     ? static_cast<const T*>(in.target_probs) + in.target_probs_rows.offset(n)
                     : nullptr;
  // Asked for before the row, so that it has arrived when the row is through.
  const Acc x_y = y.v >= 0 ? load1(x_n + y.v) : Acc(0);
  const Acc weight_y = y.v >= 0 ? o.weight_of(y.v) : Acc(0);

  using State = RowState<Acc, kTargetSums>;
  State s;
  for_each_in_row<kUnroll<T, kTargetSums>>(x_n, V, group,
                                           [&]<int U, int P>(int v, int step, Acc(&x)[U][P]) {
                                             Acc m = s.max;
#pragma unroll
                                             for (int u = 0; u < U; ++u) {
                                               if (o.softcap > 0) {
#pragma unroll
                                                 for (int i = 0; i < P; ++i)
                                                   x[u][i] = o.cap(x[u][i]);
                                               }
#pragma unroll
                                               for (int i = 0; i < P; ++i) m = max_of(m, x[u][i]);
                                             }
                                             move_to(s, m);
#pragma unroll
                                             for (int u = 0; u < U; ++u) {
                                               Acc sum = 0;
#pragma unroll
                                               for (int i = 0; i < P; ++i)
                                                 sum += softmax_exp(x[u][i] - m);
                                               s.sum += sum;
                                               if constexpr (kTargetSums) {
                                                 Acc q[P];
                                                 target_weights(o, p_n, v + u * step, q);
#pragma unroll
                                                 for (int i = 0; i < P; ++i) {
                                                   s.mass += q[i];
                                                   s.dot += q[i] * (x[u][i] - m);
                                                 }
                                               }
                                             }
                                           });
  s = group.reduce(s, State{}, MergeRows{});

  if (group.rank() == 0) write_row(a, o, y, n, s, x_y, weight_y);
}

// ---------------------------------------------------------------- reduce

struct Totals {
  double ce = 0;
  double z = 0;
  double weight = 0;
  double count = 0;  // exact up to 2^53
};

__device__ __forceinline__ Totals shuffle_down(Totals t, int delta) {
  return {cuda::shuffle_down(t.ce, delta), cuda::shuffle_down(t.z, delta),
          cuda::shuffle_down(t.weight, delta), cuda::shuffle_down(t.count, delta)};
}

__device__ __forceinline__ Totals broadcast(Totals t) {
  return {cuda::broadcast(t.ce), cuda::broadcast(t.z), cuda::broadcast(t.weight),
          cuda::broadcast(t.count)};
}

struct AddTotals {
  __device__ __forceinline__ Totals operator()(Totals a, Totals b) const {
    return {a.ce + b.ce, a.z + b.z, a.weight + b.weight, a.count + b.count};
  }
};

// One block, each thread its own rows in order: the bits depend on N alone.
template <class Acc>
__global__ void __launch_bounds__(kReduceThreads)
    cross_entropy_reduce_kernel(const __grid_constant__ CrossEntropyReduceArgs a) {
  const CrossEntropyInputs& in = a.in;
  const Acc* row_loss = static_cast<const Acc*>(a.row_loss);
  const Acc* row_max = static_cast<const Acc*>(a.row_max);
  const Acc* row_log_sum = static_cast<const Acc*>(a.row_log_sum);
  const Acc* weight = static_cast<const Acc*>(in.weight);
  constexpr int kAtOnce = sizeof(Acc) == 8 ? 2 : 4;  // rows whose loads are under way together
  struct Row {
    Target y;
    Acc loss, max, log_sum;
  };
  Totals t;
  for (int64_t n0 = threadIdx.x; n0 < in.N; n0 += kAtOnce * kReduceThreads) {
    Row row[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t n = n0 + u * kReduceThreads;
      if (n >= in.N) break;
      row[u] = {Target(in.target, in.ignore_index, in.V, n), row_loss[n], row_max[n],
                row_log_sum[n]};
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (n0 + u * kReduceThreads >= in.N) break;
      const auto& [y, loss, max, log_sum] = row[u];
      if (y.ignored) continue;
      t.ce += loss;
      const double lse = static_cast<double>(max) + log_sum;
      t.z += lse * lse;
      t.weight += y.v >= 0 && weight ? weight[y.v] : Acc(1);
      t.count += 1;
    }
  }
  t = BlockGroup().reduce(t, Totals{}, AddTotals{});
  if (threadIdx.x != 0) return;
  const bool mean = a.reduction == Reduction::kMean;
  Acc* norm = static_cast<Acc*>(a.norm);
  const double z_norm = mean ? 1.0 / t.count : 1.0;
  norm[0] = static_cast<Acc>(mean ? 1.0 / t.weight : 1.0);
  norm[1] = static_cast<Acc>(z_norm);
  // Without z_loss its term is left out, not multiplied by zero: an infinite lse would make it NaN.
  const double loss = mean ? t.ce / t.weight : t.ce;
  *static_cast<Acc*>(a.loss) =
      static_cast<Acc>(in.z_loss == 0 ? loss : loss + in.z_loss * t.z * z_norm);
}

}  // namespace

// ---------------------------------------------------------------- launchers

void cross_entropy_forward(const CrossEntropyForwardArgs& a, Stream stream) {
  if (a.in.side) return forward_columns(a, stream);
  specialize(a.in, [&]<class T, class Sums, class Group>(TypeTag<T>, Sums, TypeTag<Group>) {
    launch(cross_entropy_forward_kernel<T, Sums::value, Group>,
           config_of<T, Group>("cross_entropy", a.in, stream), a);
  });
}

void cross_entropy_reduce(const CrossEntropyReduceArgs& a, Stream stream) {
  const LaunchConfig config{.name = "cross_entropy", .block = kReduceThreads, .stream = stream};
  a.in.dtype == DType::kFloat64 ? launch(cross_entropy_reduce_kernel<double>, config, a)
                                : launch(cross_entropy_reduce_kernel<float>, config, a);
}

void visit_cross_entropy_kernels(VisitKernel visit, void* context) {
  for_each_specialization([&]<class T, class Sums, class Group>(TypeTag<T>, Sums, TypeTag<Group>,
                                                                const std::string& options) {
    visit(context, ("cross_entropy_forward" + options).c_str(),
          reinterpret_cast<const void*>(cross_entropy_forward_kernel<T, Sums::value, Group>));
  });
  visit(context, "cross_entropy_reduce<float32>",
        reinterpret_cast<const void*>(cross_entropy_reduce_kernel<float>));
  visit(context, "cross_entropy_reduce<float64>",
        reinterpret_cast<const void*>(cross_entropy_reduce_kernel<double>));
}

}  // namespace seqkern::cuda
