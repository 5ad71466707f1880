// Softmax-cross-entropy on CUDA of rows that lie side by side, as those of [B, V, T] do: a lane is
// a row, so that a warp reads a line of memory for each class. Warps of a block share rows of many
// classes. No row is copied.
#include "cuda/cross_entropy.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 256;      // of a block in which one warp or four take the same rows
constexpr int kMostThreads = 512;  // of one in which all warps do
// Classes whose loads are under way together.
template <class T>
constexpr int kAtOnce = sizeof(T) == 8 ? 4 : 8;

// Warps that share their rows: from V alone, so that a row's bits do not depend on the others.
int warps_of_rows(int64_t V) { return V <= 32 ? 1 : V <= 256 ? 4 : kMostThreads / kWarp; }

// A thread's row, and its slice of the classes: slice, slice + slices, ..
struct Part {
  int64_t n;
  int slice, slices;

  __device__ explicit Part(int slices) : slices(slices) {
    const int warp = threadIdx.x / kWarp, teams = blockDim.x / kWarp / slices;
    n = (int64_t{blockIdx.x} * teams + warp / slices) * kWarp + threadIdx.x % kWarp;
    slice = warp % slices;
  }
};

template <class T>
__device__ __forceinline__ const T* row_at(const void* base, const ClassColumns& c, int64_t side,
                                           int64_t n) {
  return static_cast<const T*>(base) + n / side * c.batch_stride + n % side;
}

// w_v q_v of one class, as target_weights; p is null without probabilities.
template <class T, class Acc>
__device__ __forceinline__ Acc target_weight(const Options<Acc>& o, const T* p, int64_t stride,
                                             int v) {
  const Acc q = p ? load1(p + v * stride) * o.keep + o.uniform : o.uniform;
  return o.weight ? q * o.weight[v] : q;
}

// Calls f<U>(v) for the classes v, v + slices, .. of a slice, U of them at a time.
template <int kAtOnce, class F>
__device__ __forceinline__ void for_each_class(const Part& part, int V, F&& f) {
  int v = part.slice;
  for (; v + (kAtOnce - 1) * part.slices < V; v += kAtOnce * part.slices) {
    f.template operator()<kAtOnce>(v);
  }
  for (; v < V; v += part.slices) f.template operator()<1>(v);
}

// The values of a row's slices, merged in their order; all threads of the block call it.
template <class Value, class Merge>
__device__ __forceinline__ Value merged(const Part& part, Value value, Merge merge) {
  if (part.slices == 1) return value;
  struct Values {
    Value of[kMostThreads];
  };
  Values& values = shared<Values>();
  values.of[threadIdx.x] = value;
  __syncthreads();
  const Value* first = values.of + threadIdx.x - part.slice * kWarp;
  value = *first;
  for (int s = 1; s < part.slices; ++s) value = merge(value, first[s * kWarp]);
  return value;
}

// ---------------------------------------------------------------- forward

template <class T, bool kTargetSums>
__global__ void __launch_bounds__(kMostThreads, 1)
    cross_entropy_columns_kernel(const __grid_constant__ CrossEntropyForwardArgs a, int slices) {
  using Acc = AccOf<T>;
  const CrossEntropyInputs& in = a.in;
  const Part part(slices);
  const int64_t n = part.n;
  const bool exists = n < in.N;
  const Target y = exists ? Target(in.target, in.ignore_index, in.V, n) : Target{};
  const bool skipped = !exists || (y.ignored && !a.lse);
  const Options<Acc> o(in);
  const int64_t stride = in.logits_columns.class_stride;
  const int64_t p_stride = in.target_probs_columns.class_stride;
  const T* x_n = nullptr;
  const T* p_n = nullptr;
  RowState<Acc, kTargetSums> s;
  if (!skipped) {
    x_n = row_at<T>(in.logits, in.logits_columns, in.side, n);
    if (in.target_probs) p_n = row_at<T>(in.target_probs, in.target_probs_columns, in.side, n);
    for_each_class<kAtOnce<T>>(part, static_cast<int>(in.V), [&]<int U>(int v) {
      Acc x[U];
#pragma unroll
      for (int u = 0; u < U; ++u) x[u] = load1(x_n + (v + u * slices) * stride);
      Acc m = s.max;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        x[u] = o.cap(x[u]);
        m = max_of(m, x[u]);
      }
      move_to(s, m);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        s.sum += softmax_exp(x[u] - m);
        if constexpr (kTargetSums) {
          const Acc q = target_weight(o, p_n, p_stride, v + u * slices);
          s.mass += q;
          s.dot += q * (x[u] - m);
        }
      }
    });
  }
  s = merged(part, s, MergeRows{});
  if (!exists || part.slice != 0) return;
  if (skipped) {
    skip_row<Acc>(a, n);
  } else {
    const Acc x_y = y.v >= 0 ? load1(x_n + y.v * stride) : Acc(0);
    write_row(a, o, y, n, s, x_y, y.v >= 0 ? o.weight_of(y.v) : Acc(0));
  }
}

// ---------------------------------------------------------------- backward

template <class T, bool kTargetSums>
__global__ void __launch_bounds__(kMostThreads, 1)
    cross_entropy_columns_backward_kernel(const __grid_constant__ CrossEntropyBackwardArgs a,
                                          int slices) {
  using Acc = AccOf<T>;
  const CrossEntropyInputs& in = a.in;
  const Part part(slices);
  const int64_t n = part.n;
  const int V = static_cast<int>(in.V);
  const bool exists = n < in.N;
  const Options<Acc> o(in);
  const int64_t p_stride = in.target_probs_columns.class_stride;
  Target y;
  RowGradient<Acc> row{};
  const T* p_n = nullptr;
  if (exists) {
    y = Target(in.target, in.ignore_index, in.V, n);
    row = RowGradient<Acc>(a, y, n);
    if (in.target_probs) p_n = row_at<T>(in.target_probs, in.target_probs_columns, in.side, n);
  }
  Acc mass = smoothing_mass(in, o);
  if (kTargetSums && in.target_probs) {
    if (exists) {
      for_each_class<kAtOnce<T>>(part, V, [&]<int U>(int v) {
#pragma unroll
        for (int u = 0; u < U; ++u) mass += target_weight(o, p_n, p_stride, v + u * slices);
      });
    }
    mass = merged(part, mass, Add<Acc>{});
  }
  if (!exists) return;

  T* dx_n = static_cast<T*>(a.dlogits) + (n / in.side * in.V * in.side + n % in.side);
  if (y.ignored && row.g_lse == 0) {
    for (int v = part.slice; v < V; v += slices) store1(dx_n + v * in.side, Acc(0));
    return;
  }
  row.finish(o, y, mass);
  const int64_t stride = in.logits_columns.class_stride;
  const T* x_n = row_at<T>(in.logits, in.logits_columns, in.side, n);
  for_each_class<kAtOnce<T>>(part, V, [&]<int U>(int v0) {
    Acc x[U];
#pragma unroll
    for (int u = 0; u < U; ++u) x[u] = load1(x_n + (v0 + u * slices) * stride);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = v0 + u * slices;
      const Acc cap_derivative = o.softcap > 0 ? tanh_derivative(x[u] * o.inverse_cap) : Acc(1);
      const Acc x_v = o.cap(x[u]);
      Acc d = v == y.v && row.on_target != 0 ? row.of_class(x_v) : row.of(x_v);
      if constexpr (kTargetSums) d -= target_weight(o, p_n, p_stride, v) * row.g_ce;
      if (o.softcap > 0) d *= cap_derivative;
      store1(dx_n + v * in.side, d);
    }
  });
}

// Calls f(TypeTag<T>, kTargetSums, launch configuration, slices) for the inputs.
template <class F>
void configured(const char* name, const CrossEntropyInputs& in, Stream stream, F&& f) {
  check_row_length(name, in.V);
  const int slices = warps_of_rows(in.V);
  const unsigned threads = slices * kWarp > kThreads ? kMostThreads : kThreads;
  const int64_t blocks = ceil_div<int64_t>(in.N, threads / slices);
  if (blocks > INT_MAX) {
    throw_value_error(std::string(name) + ": too many rows for one launch, " +
                      std::to_string(in.N));
  }
  const LaunchConfig config{
      .name = name, .grid = static_cast<unsigned>(blocks), .block = threads, .stream = stream};
  dispatch_dtype(in.dtype, [&](auto tag) {
    in.label_smoothing != 0 || in.target_probs ? f(tag, std::true_type{}, config, slices)
                                               : f(tag, std::false_type{}, config, slices);
  });
}

}  // namespace

// ---------------------------------------------------------------- launchers

void forward_columns(const CrossEntropyForwardArgs& a, Stream stream) {
  configured("cross_entropy", a.in, stream,
             [&]<class T, class Sums>(TypeTag<T>, Sums, const LaunchConfig& config, int slices) {
               launch(cross_entropy_columns_kernel<T, Sums::value>, config, a, slices);
             });
}

void backward_columns(const CrossEntropyBackwardArgs& a, Stream stream) {
  configured("cross_entropy_backward", a.in, stream,
             [&]<class T, class Sums>(TypeTag<T>, Sums, const LaunchConfig& config, int slices) {
               launch(cross_entropy_columns_backward_kernel<T, Sums::value>, config, a, slices);
             });
}

void visit_cross_entropy_columns_kernels(VisitKernel visit, void* context) {
  const auto of_sums = [&]<class T, class Sums>(TypeTag<T>, Sums, const std::string& options) {
    visit(context, ("cross_entropy_columns" + options).c_str(),
          reinterpret_cast<const void*>(cross_entropy_columns_kernel<T, Sums::value>));
    visit(context, ("cross_entropy_columns_backward" + options).c_str(),
          reinterpret_cast<const void*>(cross_entropy_columns_backward_kernel<T, Sums::value>));
  };
  const auto of_type = [&](auto tag, const std::string& dtype) {
    of_sums(tag, std::false_type{}, "<" + dtype + ">");
    of_sums(tag, std::true_type{}, "<" + dtype + ", target sums>");
  };
  of_type(TypeTag<float>{}, "float32");
  of_type(TypeTag<double>{}, "float64");
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
