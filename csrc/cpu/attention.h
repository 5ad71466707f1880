// What forward and backward of attention share.
#pragma once

#include "cpu/attention_plan.h"
#include "cpu/simd.h"
#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct Score {
  using Acc = AccOf<T>;
  Score(const AttentionInputs& in, int64_t b, int64_t h)
      : in(in), b(b), h(h), kv(h / (in.NH / in.NKV)) {}

  const T* q(int64_t i) const {
    return static_cast<const T*>(in.q) + b * in.q_strides.b + h * in.q_strides.h +
           i * in.q_strides.t;
  }
  const T* k(int64_t j) const {
    return static_cast<const T*>(in.k) + b * in.k_strides.b + kv * in.k_strides.h +
           j * in.k_strides.t;
  }
  const T* v(int64_t j) const {
    return static_cast<const T*>(in.v) + b * in.v_strides.b + kv * in.v_strides.h +
           j * in.v_strides.t;
  }

  struct Value {
    Acc value, derivative;
  };
  Value operator()(int64_t i, int64_t j) const {
    Acc s = 0;
    for (int64_t d = 0; d < in.D; ++d) s += load1(q(i) + d) * load1(k(j) + d);
    s *= static_cast<Acc>(in.scale);
    Acc derivative = 1;
    if (in.softcap > 0) {
      const Acc t = static_cast<Acc>(::tanh(s / in.softcap));
      s = static_cast<Acc>(in.softcap) * t;
      derivative = 1 - t * t;
    }
    if (in.alibi_slopes) {
      s -= static_cast<Acc>(in.alibi_slopes[b * in.alibi_batch_stride + h]) *
           static_cast<Acc>(i + in.Tk - in.Tq - j);
    }
    return {s, derivative};
  }
  Acc keep(int64_t i, int64_t j) const {
    if (!in.seed) return 1;
    const PhiloxBits bits =
        attention_dropout_bits(static_cast<uint64_t>(*in.seed), b, h, in.NH, i, j / 4);
    return bits.word[j % 4] >= dropout_threshold(in.dropout_p)
               ? static_cast<Acc>(1 / (1 - in.dropout_p))
               : Acc(0);
  }

  const AttentionInputs& in;
  int64_t b, h, kv;
};

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
