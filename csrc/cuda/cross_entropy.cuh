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

// ---------------------------------------------------------------- launching

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
