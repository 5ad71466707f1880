// Vector exp, log and tanh of the current ISA. Coefficients: minimax fits made for seqkern (Remez,
// 60 digits).
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace seqkern::cpu::SEQKERN_ISA {

template <class Acc>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr int kMantissaBits = 23;
  // Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits; 127 more is the exponent's
  // bias.
  static constexpr float kRound = 12582912.0f + 127.0f;
  static constexpr float kLog2e = 1.44269504088896340736f;
  // ln 2 in two parts; the first has 9 bits, so that n * hi is exact without FMA too.
  static constexpr float kLn2Hi = 0.693359375f;
  static constexpr float kLn2Lo = -2.12194440054690583e-4f;
  static constexpr float kMin = -87.33654f;  // below: results are subnormal, flushed to 0
  // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, relative error of e^r under 0.06 * 2^-24
  static constexpr float kQ[] = {0.499999934321f, 0.16666520399f, 0.0416683907835f,
                                 0.00836874510894f, 0.00138145401768f};
};

template <>
struct ExpTraits<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 6755399441055744.0 + 1023.0;
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2Hi = 0.693147180369123816490;  // 32 bits
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kMin = -708.39641853226408;
  static constexpr double kQ[] = {
      0.50000000000000000441,   0.16666666666666683487,   0.041666666666666091979,
      0.0083333333333169823687, 0.0013888888889116359378, 0.00019841269896515466487,
      2.480158692572155269e-5,  2.7557234727511045223e-6, 2.7557582278659935356e-7,
      2.5112084606524842324e-8, 2.0826783785305146841e-9};
};

// e^r - 1 for |r| <= ln(2)/2, with full relative accuracy.
template <class Acc>
SEQKERN_INLINE Vec<Acc> exp_minus_one_reduced(Vec<Acc> r) {
  using C = ExpTraits<Acc>;
  constexpr int kTerms = sizeof(C::kQ) / sizeof(C::kQ[0]);
  Vec<Acc> q = splat<Vec<Acc>>(C::kQ[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) q = q * r + C::kQ[i];
  return (q * r) * r + r;
}

// e^x for x <= 0 (what a softmax needs): at most 2 ulp where the result is normal, 0 below that,
// NaN for NaN. There is no overflow branch: x > 88 is outside its domain.
template <class Acc>
SEQKERN_INLINE Vec<Acc> exp_nonpositive(Vec<Acc> x) {
  using C = ExpTraits<Acc>;
  using V = Vec<Acc>;
  using I = typename VecTraits<Acc>::I;
  using U = typename VecTraits<Acc>::U;
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  V r = x - n * C::kLn2Hi;
  r = r - n * C::kLn2Lo;
  const V p = exp_minus_one_reduced<Acc>(r) + Acc(1);
  const V scale = bitcast<V>(bitcast<U>(shifted) << C::kMantissaBits);
  // Not below (rather than above) the bound, so that NaN passes through the product.
  const I keep = ~(x < C::kMin);
  return bitcast<V>(bitcast<I>(V(p * scale)) & keep);
}

template <class Acc>
SEQKERN_INLINE Acc exp1(Acc x) {
  if constexpr (sizeof(Acc) == 4) {
    return ::expf(x);
  } else {
    return ::exp(x);
  }
}

template <class Acc>
SEQKERN_INLINE Acc log1(Acc x) {
  if constexpr (sizeof(Acc) == 4) {
    return ::logf(x);
  } else {
    return ::log(x);
  }
}

template <class Acc>
struct LogTraits;

// log((1 + s) / (1 - s)) / s - 2 = z (c_0 + z (c_1 + ..)) of z = s^2 for s^2 <= 0.0295.
template <>
struct LogTraits<float> {
  static constexpr uint32_t kRootOfHalf = 0x3f3504f3;
  static constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kC[] = {0.666667763817f, 0.399775415648f, 0.298717280222f};
};

template <>
struct LogTraits<double> {
  static constexpr uint64_t kRootOfHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kInteger = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kC[] = {0.66666666666667344128, 0.39999999999414675746,
                                  0.28571428742388012491, 0.22222198573157717871,
                                  0.18183564327007024513, 0.1531405053947184746,
                                  0.14795949746504109102};
};

// log x for x that is 0 or a normal positive number: at most 1 ulp; -inf for 0, infinity and NaN
// stay.
template <class Acc>
SEQKERN_INLINE Vec<Acc> log_nonnegative(Vec<Acc> x) {
  using C = LogTraits<Acc>;
  using E = ExpTraits<Acc>;
  using V = Vec<Acc>;
  using I = typename VecTraits<Acc>::I;
  using U = typename VecTraits<Acc>::U;
  // x = 2^n (1 + f), with 1 + f from sqrt(1/2) to sqrt(2).
  const U bits = bitcast<U>(x);
  const I exponent = bitcast<I>(bits - C::kRootOfHalf) >> E::kMantissaBits;
  const V f = bitcast<V>(bits - (bitcast<U>(exponent) << E::kMantissaBits)) - Acc(1);
  const V n = bitcast<V>(bitcast<U>(splat<V>(C::kInteger)) + bitcast<U>(exponent)) - C::kInteger;
  const V s = f / (f + Acc(2)), z = s * s;
  constexpr int kTerms = sizeof(C::kC) / sizeof(C::kC[0]);
  V r = splat<V>(C::kC[kTerms - 1]);
#pragma GCC unroll 8
  for (int i = kTerms - 2; i >= 0; --i) r = r * z + C::kC[i];
  // 2 s is f - s f, of which f is exact.
  const V y = n * E::kLn2Hi + (f - (s * (f - r * z) - n * E::kLn2Lo));
  const V infinity = splat<V>(static_cast<Acc>(__builtin_inf()));
  return select((x > Acc(0)) & (x < infinity), y, select(x == Acc(0), -infinity, x));
}

// e^x - 1 for x <= 0, with full relative accuracy: 2^n e^r - 1 as 2^n (e^r - 1) + (2^n - 1), of
// which the second part is exact, and 0 where e^x is near 1.
template <class Acc>
SEQKERN_INLINE Vec<Acc> expm1_nonpositive(Vec<Acc> x) {
  using C = ExpTraits<Acc>;
  using V = Vec<Acc>;
  using U = typename VecTraits<Acc>::U;
  constexpr Acc kMinusOne = Acc(-40);  // below: -1 to the last bit
  x = select(x < kMinusOne, splat<V>(kMinusOne), x);
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  V r = x - n * C::kLn2Hi;
  r = r - n * C::kLn2Lo;
  const V scale = bitcast<V>(bitcast<U>(shifted) << C::kMantissaBits);
  return exp_minus_one_reduced<Acc>(r) * scale + (scale - Acc(1));
}

// tanh and its derivative 1 - tanh^2, the latter without cancellation where tanh is near 1.
template <class V>
struct TanhResult {
  V value;
  V derivative;
};

SEQKERN_INLINE TanhResult<VecF> tanh_with_derivative(VecF u) {
  // With e = exp(-2|u|): tanh = (1 - e) / (1 + e), 1 - tanh^2 = 4 e / (1 + e)^2. Small |u|, where 1
  // - e would cancel: u + u^3 q(u^2), relative error under 0.003 * 2^-24.
  constexpr float kQ[] = {-0.333333309067f, 0.133332097664f,   -0.0539472045592f,
                          0.0217029685546f, -0.0081826771758f, 0.00214753970038f};
  const VecI32 sign = bitcast<VecI32>(u) & static_cast<int32_t>(0x80000000u);
  const VecF a = bitcast<VecF>(bitcast<VecI32>(u) ^ sign);
  const VecF s = a * a;
  VecF q = splat<VecF>(kQ[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) q = q * s + kQ[i];
  const VecF small = a + a * s * q;
  const VecF e = exp_nonpositive<float>(-2.0f * a);
  const VecF inverse = 1.0f / (1.0f + e);
  const VecF large = (1.0f - e) / (1.0f + e);
  const VecF t = select(a < 0.625f, small, large);
  return {bitcast<VecF>(bitcast<VecI32>(t) | sign), 4.0f * e * inverse * inverse};
}

SEQKERN_INLINE TanhResult<VecD> tanh_with_derivative(VecD u) {
  // float64 is the accuracy reference, not a speed path: libm per lane.
  TanhResult<VecD> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    const double inverse_cosh = 1.0 / ::cosh(u[i]);
    result.value[i] = ::tanh(u[i]);
    result.derivative[i] = inverse_cosh * inverse_cosh;
  }
  return result;
}

// 1 / (1 + e^-x), with full relative accuracy in both tails.
template <class Acc>
SEQKERN_INLINE Vec<Acc> sigmoid(Vec<Acc> x) {
  using I = typename VecTraits<Acc>::I;
  using Lane = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
  constexpr Lane kSign = static_cast<Lane>(Lane(1) << (8 * sizeof(Acc) - 1));
  const Vec<Acc> e = exp_nonpositive<Acc>(bitcast<Vec<Acc>>(bitcast<I>(x) | kSign));
  const Vec<Acc> one = splat<Vec<Acc>>(Acc(1));
  return select(x < Acc(0), e, one) / (one + e);
}

// tanh alone. With m = e^(-2|u|) - 1: tanh |u| = -m / (2 + m).
template <class V>
SEQKERN_INLINE V vtanh(V u) {
  using Acc = std::conditional_t<std::is_same_v<V, VecF>, float, double>;
  using I = typename VecTraits<Acc>::I;
  using Lane = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
  constexpr Lane kSign = static_cast<Lane>(Lane(1) << (8 * sizeof(Acc) - 1));
  const I sign = bitcast<I>(u) & kSign;
  const V m = expm1_nonpositive<Acc>(Acc(-2) * bitcast<V>(bitcast<I>(u) ^ sign));
  return bitcast<V>(bitcast<I>(V(-m / (Acc(2) + m))) | sign);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
