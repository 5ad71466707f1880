// Activation functions on vectors.
#pragma once

#include "cpu/vmath.h"
#include "ops/linear_step.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// x Phi(x), Phi the normal distribution function. With u = |x| / sqrt 2, Phi(-|x|) = erfc(u) / 2,
// and erfc(u) e^(u^2) is a polynomial of 1 / (1 + 0.4 u): relative error of the fit under 0.3 *
// 2^-24 to u = 6, beyond which the result is less than 2^-50.
SEQKERN_INLINE VecF gelu(VecF x) {
  constexpr float kP[] = {0.000186949958009f, 0.222246873018f,  0.253069229064f,
                          0.0828340888927f,   0.52691169072f,   -0.527239673768f,
                          0.805873404397f,    -0.448431326622f, 0.0845487523415f};
  const VecI32 magnitude = bitcast<VecI32>(x) & 0x7fffffff;
  const VecF t = 1.0f / (1.0f + 0.28284271247f * bitcast<VecF>(magnitude));
  VecF p = splat<VecF>(kP[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = p * t + kP[i];
  const VecF tail = 0.5f * p * exp_nonpositive<float>(-0.5f * x * x);
  return x * select(x < 0.0f, tail, 1.0f - tail);
}
SEQKERN_INLINE VecD gelu(VecD x) {
  // float64 is the accuracy reference, not a speed path: libm per lane.
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i)
    y[i] = 0.5 * x[i] * ::erfc(-x[i] * 0.70710678118654752440);
  return y;
}

template <class Acc>
SEQKERN_INLINE Vec<Acc> activate(Activation activation, Vec<Acc> x) {
  switch (activation) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:  // (1 + tanh(z)) / 2 is the sigmoid of 2 z
      return x * sigmoid<Acc>(Acc(1.59576912160573071176) * (x + Acc(0.044715) * x * x * x));
    case Activation::kSilu:
      return x * sigmoid<Acc>(x);
    case Activation::kRelu:  // NaN stays
      return select(x < Acc(0), Vec<Acc>{}, x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
