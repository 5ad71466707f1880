// What the kernels of softmax-cross-entropy share: options, targets, and how a launch is chosen.
#pragma once

#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
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

// Bytes of a row up to which a warp takes it alone: 8 packs per lane.
inline constexpr int64_t kWarpRowBytes = 8 * kWarp * 16;

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
  if (in.V > INT_MAX) {
    throw_value_error("cross_entropy: logits must have at most 2147483647 classes on CUDA, got " +
                      std::to_string(in.V));
  }
  dispatch_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_group = [&](auto sums) {
      in.V* static_cast<int64_t>(sizeof(T)) <= kWarpRowBytes ? f(tag, sums, TypeTag<WarpGroup>{})
                                                             : f(tag, sums, TypeTag<BlockGroup>{});
    };
    in.label_smoothing != 0 || in.target_probs ? with_group(std::true_type{})
                                               : with_group(std::false_type{});
  });
}

template <class T, class Group>
LaunchConfig config_of(const char* name, const CrossEntropyInputs& in, Stream stream) {
  int64_t blocks = in.N;
  unsigned threads = 128;
  if constexpr (std::is_same_v<Group, WarpGroup>) {
    blocks = ceil_div<int64_t>(in.N, threads / kWarp);
  } else {
    // More threads only while each still has a full batch of loads.
    const int64_t packs = in.V / kPack<T>;
    while (threads < BlockGroup::kMaxThreads && packs >= int64_t{8} * threads) threads *= 2;
  }
  if (blocks > INT_MAX) {
    throw_value_error(std::string(name) + ": logits have too many rows for one launch, " +
                      std::to_string(in.N));
  }
  return {.name = name, .grid = static_cast<unsigned>(blocks), .block = threads, .stream = stream};
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
