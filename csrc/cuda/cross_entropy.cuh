// What the kernels of softmax-cross-entropy share: options, targets, and how a launch is chosen.
#pragma once

#include <string>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/softmax.cuh"
#include "cuda/vec.cuh"
#include "ops/cross_entropy.h"

namespace seqkern::cuda {

// 128-bit loads in flight per thread. Less where each element needs many registers: a spill costs
// more.
template <class T, bool kTargetSums>
inline constexpr int kUnroll = sizeof(T) == 8 ? 1
                               : kTargetSums  ? 2
                                              : 4;

// Blocks that share a multiprocessor, at least, where a block takes a row: with one, nothing is
// under way while it reduces or begins. In float64 four would need memory for registers.
template <class T, class Group>
inline constexpr int kBlocksAtOnce = !std::is_same_v<Group, BlockGroup> ? 1
                                     : sizeof(T) == 8                   ? 3
                                                                        : 4;

// ---------------------------------------------------------------- options and targets

template <class Acc>
struct Options {
  __device__ explicit Options(const CrossEntropyInputs& in)
      : weight(static_cast<const Acc*>(in.weight)),
        keep(Acc(1) - static_cast<Acc>(in.label_smoothing)),
        uniform(static_cast<Acc>(in.label_smoothing) / static_cast<Acc>(in.V)),
        softcap(static_cast<Acc>(in.softcap)),
        inverse_cap(in.softcap > 0 ? Acc(1) / static_cast<Acc>(in.softcap) : Acc(0)),
        z_loss(static_cast<Acc>(in.z_loss)) {}

  const Acc* weight;  // [V] or null
  Acc keep;           // 1 - label_smoothing
  Acc uniform;        // label_smoothing / V
  Acc softcap;
  Acc inverse_cap;
  Acc z_loss;

  __device__ __forceinline__ Acc weight_of(int v) const { return weight ? weight[v] : Acc(1); }
  // Rounded before it is compared or subtracted: the row's maximum minus itself must be 0.
  __device__ __forceinline__ Acc cap(Acc x) const {
    return softcap > 0 ? rounded_product(tanh_of(x * inverse_cap), softcap) : x;
  }
};

// w_v q_v of elements [v, v + P): q is uniform for label smoothing of class indices, or the
// probabilities p_n with smoothing mixed in.
template <int P, class T, class Acc>
__device__ __forceinline__ void target_weights(const Options<Acc>& o, const T* p_n, int v,
                                               Acc (&q)[P]) {
  if (p_n) {
    load_run<P>(p_n + v, q);
#pragma unroll
    for (int i = 0; i < P; ++i) q[i] = q[i] * o.keep + o.uniform;
  } else {
#pragma unroll
    for (int i = 0; i < P; ++i) q[i] = o.uniform;
  }
  if (o.weight) {
#pragma unroll
    for (int i = 0; i < P; ++i) q[i] *= o.weight[v + i];
  }
}

// ---------------------------------------------------------------- a row's results

// Writes row n from the state of all its elements; x_y and weight_y are of its class.
template <class Acc, bool kTargetSums>
__device__ __forceinline__ void write_row(const CrossEntropyForwardArgs& a, const Options<Acc>& o,
                                          const Target& y, int64_t n,
                                          const RowState<Acc, kTargetSums>& s, Acc x_y,
                                          Acc weight_y) {
  const Acc log_sum = log_of(s.sum);
  const Acc lse = s.max + log_sum;
  Acc loss = 0;
  if (!y.ignored) {
    if (y.v >= 0) loss = o.keep * weight_y * (log_sum + (s.max - o.cap(x_y)));
    if constexpr (kTargetSums) loss += s.mass * log_sum - s.dot;
    if (a.add_z_loss) loss += o.z_loss * lse * lse;
    if (y.invalid) loss = quiet_nan<Acc>();
  }
  static_cast<Acc*>(a.row_max)[n] = s.max;
  static_cast<Acc*>(a.row_log_sum)[n] = log_sum;
  static_cast<Acc*>(a.row_loss)[n] = loss;
  if (a.lse) static_cast<Acc*>(a.lse)[n] = lse;
}

// What is kept of an ignored row, which is not read.
template <class Acc>
__device__ __forceinline__ void skip_row(const CrossEntropyForwardArgs& a, int64_t n) {
  static_cast<Acc*>(a.row_max)[n] = 0;
  static_cast<Acc*>(a.row_log_sum)[n] = 0;
  static_cast<Acc*>(a.row_loss)[n] = 0;
}

// What row n's gradient is made of: dx_v = scale * p_v - g_ce w_v q_v with p_v = exp((x_v - m) -
// log_sum), and for its class on_target * (p - 1) + rest * p.
template <class Acc>
struct RowGradient {
  Acc m, log_sum, g_ce, g_z, g_lse, on_target = 0, rest = 0, scale = 0;

  RowGradient() = default;
  // All loads are asked for before any of it is looked at: a round trip to memory for all.
  __device__ __forceinline__ RowGradient(const CrossEntropyBackwardArgs& a, const Target& y,
                                         int64_t n) {
    const Acc* grad_loss = static_cast<const Acc*>(a.grad_loss);
    const Acc* norm = static_cast<const Acc*>(a.norm);
    const Acc g_row = grad_loss ? grad_loss[n * a.grad_loss_stride] : Acc(0);
    const Acc norm_ce = norm ? norm[0] : Acc(1);
    const Acc norm_z = norm ? norm[1] : Acc(1);
    g_lse = a.grad_lse ? static_cast<const Acc*>(a.grad_lse)[n] : Acc(0);
    m = static_cast<const Acc*>(a.row_max)[n];
    log_sum = static_cast<const Acc*>(a.row_log_sum)[n];
    const Acc g = y.ignored ? Acc(0) : g_row;
    // Nothing flows where g is 0, even where the norm is infinite (all rows ignored).
    g_ce = g == 0 ? Acc(0) : g * norm_ce;
    g_z = g == 0 ? Acc(0) : g * norm_z;
  }
  // `mass` is that of the row's target distribution.
  __device__ __forceinline__ void finish(const Options<Acc>& o, const Target& y, Acc mass) {
    on_target = y.v >= 0 ? g_ce * o.keep * o.weight_of(y.v) : Acc(0);
    if (y.invalid) on_target = quiet_nan<Acc>();
    const Acc z = o.z_loss == 0 ? Acc(0) : g_z * 2 * o.z_loss * (m + log_sum);
    rest = g_ce * mass + z + g_lse;
    scale = on_target + rest;
  }
  __device__ __forceinline__ Acc of(Acc x) const { return softmax_exp((x - m) - log_sum) * scale; }
  // p_y - 1 as expm1: exact where the model is sure, which is where the subtraction would cancel.
  __device__ __forceinline__ Acc of_class(Acc x) const {
    const Acc log_p = (x - m) - log_sum;
    return on_target * expm1_of(log_p) + rest * softmax_exp(log_p);
  }
};

// The mass of what label smoothing puts on class indices.
template <class Acc>
__device__ __forceinline__ Acc smoothing_mass(const CrossEntropyInputs& in, const Options<Acc>& o) {
  if (!in.target) return 0;
  const Acc* weight_sum = static_cast<const Acc*>(in.weight_sum);
  return o.uniform * (weight_sum ? *weight_sum : static_cast<Acc>(in.V));
}

// ---------------------------------------------------------------- launching

// Of rows that lie side by side (cross_entropy_columns.cu).
void forward_columns(const CrossEntropyForwardArgs& a, Stream stream);
void backward_columns(const CrossEntropyBackwardArgs& a, Stream stream);

// Calls f(TypeTag<T>, kTargetSums, TypeTag<Group>) for the inputs' dtype, options and row length.
template <class F>
void specialize(const CrossEntropyInputs& in, F&& f) {
  check_row_length("cross_entropy", in.V);
  dispatch_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_group = [&](auto sums) {
      warp_takes_row<T>(in.V) ? f(tag, sums, TypeTag<WarpGroup>{})
                              : f(tag, sums, TypeTag<BlockGroup>{});
    };
    in.label_smoothing != 0 || in.target_probs ? with_group(std::true_type{})
                                               : with_group(std::false_type{});
  });
}

// Calls f(TypeTag<T>, kTargetSums, TypeTag<Group>, "<dtype, options>") for every specialisation.
template <class F>
void for_each_specialization(F&& f) {
  const auto of_type = [&](auto tag, const std::string& dtype) {
    f(tag, std::false_type{}, TypeTag<WarpGroup>{}, "<" + dtype + ", warp per row>");
    f(tag, std::false_type{}, TypeTag<BlockGroup>{}, "<" + dtype + ", block per row>");
    f(tag, std::true_type{}, TypeTag<WarpGroup>{}, "<" + dtype + ", target sums, warp per row>");
    f(tag, std::true_type{}, TypeTag<BlockGroup>{}, "<" + dtype + ", target sums, block per row>");
  };
  of_type(TypeTag<float>{}, "float32");
  of_type(TypeTag<double>{}, "float64");
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
