// Linear-cross-entropy on CUDA: a chunk's logits, just written by a GEMM, folded into its rows'
// state and then overwritten with their gradient.
#include <climits>

#include "common/errors.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/softmax.cuh"
#include "cuda/vec.cuh"
#include "ops/linear_cross_entropy.h"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLinearUnroll = 2;
// Bytes of a row up to which a warp takes it alone: 8 packs per lane.
constexpr int64_t kWarpTileBytes = 8 * kWarp * 16;

// A tile's logits as the softmax sees them.
template <class Acc>
struct TileOptions {
  __device__ TileOptions(const LinearCrossEntropyRows& rows, const LogitsTile& tile)
      : bias(static_cast<const Acc*>(tile.bias)),
        weight(rows.class_weight ? static_cast<const Acc*>(rows.class_weight) + tile.first_class
                                 : nullptr),
        softcap(static_cast<Acc>(rows.softcap)),
        inverse_cap(rows.softcap > 0 ? Acc(1) / static_cast<Acc>(rows.softcap) : Acc(0)) {}

  const Acc* bias;    // [width] or null
  const Acc* weight;  // [width] or null
  Acc softcap;
  Acc inverse_cap;

  __device__ __forceinline__ Acc biased(Acc x, int v) const { return bias ? x + bias[v] : x; }
  // Rounded before it is compared or subtracted: the row's maximum minus itself must be 0.
  __device__ __forceinline__ Acc cap(Acc x) const {
    return softcap > 0 ? rounded_product(tanh_of(x * inverse_cap), softcap) : x;
  }
};

// ---------------------------------------------------------------- state

template <class Acc, bool kSmooth, class Group>
__global__ void __launch_bounds__(Group::kMaxThreads, 1)
    linear_cross_entropy_state_kernel(const __grid_constant__ LinearCrossEntropyStateArgs a) {
  const LinearCrossEntropyRows& rows = a.rows;
  const Group group;
  const int64_t n = group.row();
  if (n >= rows.N) return;  // whole groups leave, so no reduction waits for them
  Acc* state = static_cast<Acc*>(a.state) + n;
  const auto part = [&](int k) -> Acc& { return state[k * a.stride]; };
  const Target y(rows.target, rows.ignore_index, rows.V, n);
  const bool skip = rows.skip_ignored && y.ignored;
  RowState<Acc, true> total;
  Acc x_y = 0;
  if (!a.first && group.rank() == 0) {
    total.max = part(kStateMax);
    total.sum = part(kStateSum);
    total.mass = part(kStateMass);
    total.dot = part(kStateDot);
    x_y = part(kStateTarget);
  }

  if (!skip) {
    const TileOptions<Acc> o(rows, a.tile);
    const int width = static_cast<int>(a.tile.width);
    const Acc* x_n = static_cast<const Acc*>(a.tile.logits) + n * a.tile.width;
    const int64_t own = y.v - a.tile.first_class;  // negative without a class here
    if (y.v >= 0 && own >= 0 && own < width) {
      x_y = o.cap(o.biased(x_n[own], static_cast<int>(own)));
    }
    RowState<Acc, kSmooth> s;
    for_each_in_row<kLinearUnroll>(
        x_n, width, group, [&]<int U, int P>(int v, int step, Acc(&x)[U][P]) {
          Acc m = s.max;
#pragma unroll
          for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int i = 0; i < P; ++i) {
              x[u][i] = o.cap(o.biased(x[u][i], v + u * step + i));
              m = max_of(m, x[u][i]);
            }
          }
          move_to(s, m);
#pragma unroll
          for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int i = 0; i < P; ++i) {
              s.sum += softmax_exp(x[u][i] - m);
              if constexpr (kSmooth) {
                const Acc w = o.weight ? o.weight[v + u * step + i] : Acc(1);
                s.mass += w;
                s.dot += w * (x[u][i] - m);
              }
            }
          }
        });
    s = group.reduce(s, RowState<Acc, kSmooth>{}, MergeRows{});
    RowState<Acc, true> tile;
    tile.max = s.max;
    tile.sum = s.sum;
    if constexpr (kSmooth) {
      tile.mass = s.mass;
      tile.dot = s.dot;
    }
    total = MergeRows{}(total, tile);
  }

  if (group.rank() == 0) {
    part(kStateMax) = total.max;
    part(kStateSum) = total.sum;
    part(kStateTarget) = x_y;
    part(kStateMass) = total.mass;
    part(kStateDot) = total.dot;
  }
}

// ---------------------------------------------------------------- finish

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    linear_cross_entropy_finish_kernel(const __grid_constant__ LinearCrossEntropyFinishArgs a) {
  const LinearCrossEntropyRows& rows = a.rows;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= rows.N) return;
  const Acc* state = static_cast<const Acc*>(a.state) + n;
  const auto part = [&](int k) { return state[k * a.stride]; };
  const Target y(rows.target, rows.ignore_index, rows.V, n);
  const Acc smoothing = static_cast<Acc>(rows.label_smoothing);
  const Acc m = part(kStateMax);
  const Acc log_sum = log_of(part(kStateSum));
  const Acc lse = m + log_sum;
  Acc log_p = 0;
  Acc loss = 0;
  if (!y.ignored) {
    const Acc* weight = static_cast<const Acc*>(rows.class_weight);
    const Acc weight_y = weight && y.v >= 0 ? weight[y.v] : Acc(1);
    log_p = (part(kStateTarget) - m) - log_sum;
    loss = (Acc(1) - smoothing) * weight_y * -log_p;
    if (smoothing > 0) {
      loss += smoothing / static_cast<Acc>(rows.V) * (part(kStateMass) * log_sum - part(kStateDot));
    }
    if (a.add_z_loss) loss += static_cast<Acc>(rows.z_loss) * lse * lse;
    if (y.invalid) loss = log_p = quiet_nan<Acc>();
  }
  static_cast<Acc*>(a.row_loss)[n] = loss;
  if (a.lse) static_cast<Acc*>(a.lse)[n] = lse;
  if (a.logprob) static_cast<Acc*>(a.logprob)[n] = log_p;
  const bool unused = y.ignored && rows.skip_ignored;
  static_cast<Acc*>(a.row_log_sum)[n] = unused ? Acc(0) : log_sum;
  static_cast<Acc*>(a.row_max)[n] = unused ? Acc(0) : m;
  static_cast<Acc*>(a.row_sum)[n] = unused ? Acc(1) : part(kStateSum);
}

// ---------------------------------------------------------------- gradient

// dx_v = scale * p_v - g w_v e / V, times the cap's derivative. p_v = exp(x_v - m) / sum: the
// rounding of log(sum) would be an error of all p_v alike, which the GEMMs' sums do not average
// out.
template <class G, bool kSmooth, class Group>
__global__ void __launch_bounds__(Group::kMaxThreads, 1)
    linear_cross_entropy_gradient_kernel(const __grid_constant__ LinearCrossEntropyGradientArgs a) {
  using Acc = AccOf<G>;
  const LinearCrossEntropyRows& rows = a.rows;
  const Group group;
  const int64_t n = group.row();
  if (n >= rows.N) return;
  const int width = static_cast<int>(a.tile.width);
  const Target y(rows.target, rows.ignore_index, rows.V, n);
  const auto at_row = [&](const void* p, int64_t i) {
    return p ? static_cast<const Acc*>(p)[i] : Acc(0);
  };
  const Acc* norm = static_cast<const Acc*>(a.norm);
  // Asked for before any of it is looked at: a round trip to memory for all.
  const Acc g_row = at_row(a.grad_loss, n * a.grad_loss_stride);
  const Acc norm_ce = norm ? norm[0] : Acc(1);
  const Acc norm_z = norm ? norm[1] : Acc(1);
  const Acc g_lse = at_row(a.grad_lse, n);
  const Acc g_logprob_row = at_row(a.grad_logprob, n);
  const Acc m = at_row(a.row_max, n);
  const Acc sum = at_row(a.row_sum, n);
  const Acc g = y.ignored ? Acc(0) : g_row;
  const Acc g_logprob = y.ignored ? Acc(0) : g_logprob_row;
  // Nothing flows where g is 0, even where the norm is infinite (all rows ignored).
  const Acc g_ce = g == 0 ? Acc(0) : g * norm_ce;
  const Acc g_z = g == 0 ? Acc(0) : g * norm_z;
  const Acc* x_n = static_cast<const Acc*>(a.tile.logits) + n * width;
  G* dx_n = static_cast<G*>(a.dlogits) + n * width;

  if (y.ignored && (rows.skip_ignored || g_lse == 0)) {
    for_each_in_row<kLinearUnroll>(dx_n, width, group,
                                   [&]<int U, int P>(int v, int step, Acc(&)[U][P]) {
                                     const Acc zero[P] = {};
#pragma unroll
                                     for (int u = 0; u < U; ++u)
                                       store_run(dx_n + v + u * step, zero);
                                   });
    return;
  }

  const TileOptions<Acc> o(rows, a.tile);
  const Acc smoothing = static_cast<Acc>(rows.label_smoothing);
  const Acc uniform = smoothing / static_cast<Acc>(rows.V);
  const Acc log_sum = log_of(sum);
  const Acc* weight = static_cast<const Acc*>(rows.class_weight);
  const Acc weight_y = y.v < 0 ? Acc(0) : weight ? weight[y.v] : Acc(1);
  const Acc* weight_sum = static_cast<const Acc*>(rows.weight_sum);
  Acc on_target = g_ce * (Acc(1) - smoothing) * weight_y - g_logprob;
  if (y.invalid) on_target = quiet_nan<Acc>();
  const Acc mass = uniform * (weight_sum ? *weight_sum : static_cast<Acc>(rows.V));
  const Acc z = rows.z_loss == 0 ? Acc(0) : g_z * 2 * static_cast<Acc>(rows.z_loss) * (m + log_sum);
  const Acc rest = g_ce * mass + z + g_lse;
  const Acc scale = (on_target + rest) / sum;
  const int own = y.v < 0 ? INT_MIN : static_cast<int>(y.v - a.tile.first_class);

  for_each_in_row<kLinearUnroll>(
      x_n, width, group, [&]<int U, int P>(int v0, int step, Acc(&x)[U][P]) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int v = v0 + u * step;
          Acc d[P];
          Acc cap_derivative[P];
#pragma unroll
          for (int i = 0; i < P; ++i) {
            x[u][i] = o.biased(x[u][i], v + i);
            cap_derivative[i] = o.softcap > 0 ? tanh_derivative(x[u][i] * o.inverse_cap) : Acc(1);
            x[u][i] = o.cap(x[u][i]);
            d[i] = softmax_exp(x[u][i] - m) * scale;
          }
          if (static_cast<unsigned>(own - v) < static_cast<unsigned>(P) && on_target != 0) {
        // p_y - 1 as expm1: exact where the model is sure, which is where the subtraction would
        // cancel.
#pragma unroll
            for (int i = 0; i < P; ++i) {
              if (v + i == own) {
                const Acc log_p = (x[u][i] - m) - log_sum;
                d[i] = on_target * expm1_of(log_p) + rest * softmax_exp(log_p);
              }
            }
          }
#pragma unroll
          for (int i = 0; i < P; ++i) {
            if constexpr (kSmooth) {
              d[i] -= g_ce * uniform * (o.weight ? o.weight[v + i] : Acc(1));
            }
            d[i] *= cap_derivative[i];
          }
          store_run(dx_n + v, d);
        }
      });
}

// ---------------------------------------------------------------- launching

constexpr const char* kName = "linear_cross_entropy";

// Calls f(TypeTag<Group>, kSmooth, config) for the rows' options and the tile's width.
template <class F>
void specialize(const LinearCrossEntropyRows& rows, const LogitsTile& tile, Stream stream, F&& f) {
  const auto check_most = [](const char* of, int64_t most, int64_t got) {
    if (got <= most) return;
    throw_value_error(std::string(kName) + ": " + of + " must have at most " +
                      std::to_string(most) + " rows on CUDA, got " + std::to_string(got));
  };
  check_most("weight", kMostElements, rows.V);
  check_most("hidden", INT_MAX, rows.N);
  const int64_t item = rows.acc == DType::kFloat64 ? 8 : 4;
  const auto with_group = [&](auto group, unsigned grid, unsigned threads) {
    const LaunchConfig config{.name = kName, .grid = grid, .block = threads, .stream = stream};
    rows.label_smoothing != 0 ? f(group, std::true_type{}, config)
                              : f(group, std::false_type{}, config);
  };
  if (tile.width * item <= kWarpTileBytes) {
    with_group(TypeTag<WarpGroup>{},
               static_cast<unsigned>(ceil_div<int64_t>(rows.N, kThreads / kWarp)), kThreads);
  } else {
    with_group(TypeTag<BlockGroup>{}, static_cast<unsigned>(rows.N),
               threads_of_row<BlockGroup>(tile.width * item / 16));
  }
}

}  // namespace

void linear_cross_entropy_state(const LinearCrossEntropyStateArgs& a, Stream stream) {
  specialize(
      a.rows, a.tile, stream,
      [&]<class Group, class Smooth>(TypeTag<Group>, Smooth, const LaunchConfig& config) {
        a.rows.acc == DType::kFloat64
            ? launch(linear_cross_entropy_state_kernel<double, Smooth::value, Group>, config, a)
            : launch(linear_cross_entropy_state_kernel<float, Smooth::value, Group>, config, a);
      });
}

void linear_cross_entropy_finish(const LinearCrossEntropyFinishArgs& a, Stream stream) {
  const LaunchConfig config{.name = kName,
                            .grid = static_cast<unsigned>(ceil_div<int64_t>(a.rows.N, kThreads)),
                            .block = kThreads,
                            .stream = stream};
  a.rows.acc == DType::kFloat64 ? launch(linear_cross_entropy_finish_kernel<double>, config, a)
                                : launch(linear_cross_entropy_finish_kernel<float>, config, a);
}

void linear_cross_entropy_gradient(const LinearCrossEntropyGradientArgs& a, Stream stream) {
  specialize(a.rows, a.tile, stream,
             [&]<class Group, class Smooth>(TypeTag<Group>, Smooth, const LaunchConfig& config) {
               dispatch_dtype(a.grad_dtype, [&]<class G>(TypeTag<G>) {
                 launch(linear_cross_entropy_gradient_kernel<G, Smooth::value, Group>, config, a);
               });
             });
}

void visit_linear_cross_entropy_kernels(VisitKernel visit, void* context) {
  const auto add = [&](const std::string& name, auto kernel) {
    visit(context, ("linear_cross_entropy_" + name).c_str(), reinterpret_cast<const void*>(kernel));
  };
  const auto with_group = [&]<class Group>(TypeTag<Group>, const std::string& group) {
    const auto with_smoothing = [&]<class Smooth>(Smooth, const std::string& options) {
      constexpr bool kSmooth = Smooth::value;
      add("state<float32" + options, linear_cross_entropy_state_kernel<float, kSmooth, Group>);
      add("state<float64" + options, linear_cross_entropy_state_kernel<double, kSmooth, Group>);
      add("gradient<float32" + options,
          linear_cross_entropy_gradient_kernel<float, kSmooth, Group>);
      add("gradient<float64" + options,
          linear_cross_entropy_gradient_kernel<double, kSmooth, Group>);
      add("gradient<float16" + options, linear_cross_entropy_gradient_kernel<Half, kSmooth, Group>);
      add("gradient<bfloat16" + options,
          linear_cross_entropy_gradient_kernel<BFloat16, kSmooth, Group>);
    };
    with_smoothing(std::false_type{}, ", " + group + ">");
    with_smoothing(std::true_type{}, ", smoothing, " + group + ">");
  };
  with_group(TypeTag<WarpGroup>{}, "warp per row");
  with_group(TypeTag<BlockGroup>{}, "block per row");
  add("finish<float32>", linear_cross_entropy_finish_kernel<float>);
  add("finish<float64>", linear_cross_entropy_finish_kernel<double>);
}

}  // namespace seqkern::cuda
