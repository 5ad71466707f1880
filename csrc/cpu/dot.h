// Dot products of a few rows, in registers, with rows that are read once from memory: those of a
// cache of keys, those of a weight.
#pragma once

#include "cpu/part.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// f(TypeTag of `dtype`, TypeTag of `stored`), where stored is dtype or a 16-bit type beside
// float32.
template <class F>
SEQKERN_INLINE void dispatch_mixed(DType dtype, DType stored, F f) {
  dispatch_dtype(dtype, [&](auto tag) {
    if constexpr (std::is_same_v<typename decltype(tag)::type, float>) {
      if (stored == DType::kBFloat16) return f(tag, TypeTag<BFloat16>{});
      if (stored == DType::kFloat16) return f(tag, TypeTag<Half>{});
    }
    f(tag, tag);
  });
}

// Sums that fit beside the loads into the registers.
constexpr int kSums = kManyRegisters ? 16 : 8;

// sum[n R + r] = x_r * w_n, lane by lane: kN rows w of D elements, R rows x that are zero from
// there to whole vectors.
template <int kN, int R, class C, class Acc>
SEQKERN_INLINE void multiply_rows(const Acc* x, int64_t x_stride, const C* const (&w)[kN],
                                  int64_t D, Vec<Acc>* sum) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> part[R][kN] = {};
  const auto add = [&](int64_t d, const Vec<Acc>(&of_w)[kN]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<Acc> of_x = load(x + r * x_stride + d);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) part[r][n] += of_x * of_w[n];
    }
  };
  int64_t d = 0;
  for (; d + L <= D; d += L) {
    Vec<Acc> of_w[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) of_w[n] = load(w[n] + d);
    add(d, of_w);
  }
  if (d < D) {
    Vec<Acc> of_w[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) of_w[n] = load_part<Acc>(w[n] + d, D - d);
    add(d, of_w);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sum[n * R + r] = part[r][n];
  }
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
