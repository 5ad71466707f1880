// Softmax and log-softmax on CUDA. A warp takes a row that is short, a block one that is long
// (block.cuh: Group); a row is read for its maximum and sum, and once more, mostly from cache.
#include "cuda/row_launch.cuh"
#include "cuda/softmax.cuh"
#include "ops/softmax.h"

namespace seqkern::cuda {
namespace {

// 128-bit loads in flight per thread: float64 packs are two elements, and double arithmetic is
// slower than any memory.
template <class T>
inline constexpr int kSoftmaxUnroll = sizeof(T) == 8 ? 1 : 2;

// A row's second reading finds in the second-level cache what the first has brought, where few rows
// are under way: large blocks.
struct LargeBlockGroup : BlockGroup {
  static constexpr int kMaxThreads = 512;
  static constexpr int kLeastPacks = 4;
};

template <class T, bool kLog, class Group>
__global__ void __launch_bounds__(Group::kMaxThreads, 1)
    softmax_forward_kernel(const __grid_constant__ SoftmaxForwardArgs a) {
  using Acc = AccOf<T>;
  constexpr int kUnroll = kSoftmaxUnroll<T>;
  const Group group;
  const int64_t n = group.row();
  if (n >= a.N) return;  // whole groups leave, so no reduction waits for them
  const int V = static_cast<int>(a.V);
  const T* x_n = static_cast<const T*>(a.x) + a.x_rows.offset(n);
  T* y_n = static_cast<T*>(a.y) + n * a.V;

  using State = RowState<Acc, false>;
  State s;
  for_each_in_row<kUnroll>(x_n, V, group, [&]<int U, int P>(int, int, Acc(&x)[U][P]) {
    Acc m = s.max;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < P; ++i) m = max_of(m, x[u][i]);
    }
    move_to(s, m);
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < P; ++i) s.sum += softmax_exp(x[u][i] - m);
    }
  });
  s = group.reduce(s, State{}, MergeRows{});
  // What a row of -inf leaves is 0 / 0 and -inf - -inf: NaN, as it should be.
  const Acc factor = Acc(1) / s.sum;
  const Acc log_sum = log_of(s.sum);

  for_each_in_row<kUnroll>(x_n, V, group, [&]<int U, int P>(int v, int step, Acc(&x)[U][P]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Acc y[P];
#pragma unroll
      for (int i = 0; i < P; ++i) {
        const Acc d = x[u][i] - s.max;
        y[i] = kLog ? d - log_sum : softmax_exp(d) * factor;
      }
      store_run(y_n + v + u * step, y);
    }
  });
}

template <class T, bool kLog, class Group>
__global__ void __launch_bounds__(Group::kMaxThreads, 1)
    softmax_backward_kernel(const __grid_constant__ SoftmaxBackwardArgs a) {
  using Acc = AccOf<T>;
  constexpr int kUnroll = kSoftmaxUnroll<T>;
  const Group group;
  const int64_t n = group.row();
  if (n >= a.N) return;
  const int V = static_cast<int>(a.V);
  const T* dy_n = static_cast<const T*>(a.dy) + a.dy_rows.offset(n);
  const T* y_n = static_cast<const T*>(a.y) + n * a.V;
  T* dx_n = static_cast<T*>(a.dx) + n * a.V;

  Acc sum = 0;
  for_each_in_row<kUnroll>(dy_n, V, group, [&]<int U, int P>(int v, int step, Acc(&dy)[U][P]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if constexpr (kLog) {
#pragma unroll
        for (int i = 0; i < P; ++i) sum += dy[u][i];
      } else {
        Acc y[P];
        load_run<P>(y_n + v + u * step, y);
#pragma unroll
        for (int i = 0; i < P; ++i) sum += dy[u][i] * y[i];
      }
    }
  });
  sum = group.reduce(sum, Acc(0), Add<Acc>{});

  for_each_in_row<kUnroll>(dy_n, V, group, [&]<int U, int P>(int v, int step, Acc(&dy)[U][P]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Acc y[P], dx[P];
      load_run<P>(y_n + v + u * step, y);
#pragma unroll
      for (int i = 0; i < P; ++i) {
        dx[i] = kLog ? dy[u][i] - softmax_exp(y[i]) * sum : y[i] * (dy[u][i] - sum);
      }
      store_run(dx_n + v + u * step, dx);
    }
  });
}

// Calls f(TypeTag<T>, kLog, TypeTag<Group>) for dtype, option and row length.
template <class Args, class F>
void specialize(const char* name, const Args& a, F&& f) {
  check_row_length(name, a.V);
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_group = [&](auto log) {
      warp_takes_row<T>(a.V) ? f(tag, log, TypeTag<WarpGroup>{})
                             : f(tag, log, TypeTag<LargeBlockGroup>{});
    };
    a.log ? with_group(std::true_type{}) : with_group(std::false_type{});
  });
}

}  // namespace

// ---------------------------------------------------------------- launchers

void softmax_forward(const SoftmaxForwardArgs& a, Stream stream) {
  specialize("softmax", a, [&]<class T, class Log, class Group>(TypeTag<T>, Log, TypeTag<Group>) {
    launch(softmax_forward_kernel<T, Log::value, Group>, config_of<T, Group>("softmax", a, stream),
           a);
  });
}

void softmax_backward(const SoftmaxBackwardArgs& a, Stream stream) {
  specialize("softmax_backward", a,
             [&]<class T, class Log, class Group>(TypeTag<T>, Log, TypeTag<Group>) {
               launch(softmax_backward_kernel<T, Log::value, Group>,
                      config_of<T, Group>("softmax_backward", a, stream), a);
             });
}

void visit_softmax_kernels(VisitKernel visit, void* context) {
  const auto each = [&]<class T, class Log, class Group>(TypeTag<T>, Log, TypeTag<Group>,
                                                         const std::string& options) {
    visit(context, ("softmax_forward" + options).c_str(),
          reinterpret_cast<const void*>(softmax_forward_kernel<T, Log::value, Group>));
    visit(context, ("softmax_backward" + options).c_str(),
          reinterpret_cast<const void*>(softmax_backward_kernel<T, Log::value, Group>));
  };
  const auto of_type = [&](auto tag, const std::string& dtype) {
    each(tag, std::false_type{}, TypeTag<WarpGroup>{}, "<" + dtype + ", warp per row>");
    each(tag, std::false_type{}, TypeTag<LargeBlockGroup>{}, "<" + dtype + ", block per row>");
    each(tag, std::true_type{}, TypeTag<WarpGroup>{}, "<" + dtype + ", log, warp per row>");
    each(tag, std::true_type{}, TypeTag<LargeBlockGroup>{}, "<" + dtype + ", log, block per row>");
  };
  of_type(TypeTag<float>{}, "float32");
  of_type(TypeTag<double>{}, "float64");
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
