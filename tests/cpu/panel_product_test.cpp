// csrc/cpu/panel_product.cpp against sums in double. Prints "name worst" lines: errors as multiples
// of 2^-24 of the sum of the magnitudes, and how many elements beside the result were written.
#include "cpu/panel_product.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "unit.h"

namespace seqkern::cpu::SEQKERN_ISA {  // `wide` and `tiles` are no instruction sets of dispatch.cpp
SEQKERN_DECLARE_TEAM_KERNEL(panel_product, PanelProductArgs)
}  // namespace seqkern::cpu::SEQKERN_ISA

using namespace seqkern;
using namespace seqkern::cpu::SEQKERN_ISA;
namespace tested = seqkern::cpu::SEQKERN_ISA;
using cpu::PanelOperand;
using cpu::PanelProductArgs;

namespace {

#if defined(SEQKERN_TILES) || defined(SEQKERN_BF16_PAIRS)
using T = BFloat16;
constexpr DType kDType = DType::kBFloat16;
#else
using T = float;
constexpr DType kDType = DType::kFloat32;
#endif
constexpr int64_t kRowsApart = 3;  // more of out than it is wide
constexpr float kBeside = -77;

enum Layout { kAlongK, kAcrossK, kApart, kLayouts };

struct Operand {
  std::vector<T> data;
  PanelOperand operand;

  Operand(int64_t size, int64_t K, Layout layout, std::mt19937& random) : data(2 * size * K) {
    std::normal_distribution<float> normal;
    for (T& x : data) store1(&x, normal(random));
    operand = {.data = data.data(),
               .size = size,
               .stride = layout == kAcrossK ? 1 : (layout == kApart ? 2 : 1) * K,
               .k_stride = layout == kAcrossK ? size
                           : layout == kApart ? 2
                                              : 1};
  }
  double at(int64_t i, int64_t k) const {
    return load1(&data[i * operand.stride + k * operand.k_stride]);
  }
};

struct Worst {
  double error = 0, beside = 0;

  void check(int64_t N, int64_t K, int64_t M, int variant, int64_t members) {
    std::mt19937 random(static_cast<unsigned>(N * 131 + K * 17 + M + variant));
    const Operand a(N, K, static_cast<Layout>(variant % kLayouts), random);
    const Operand b(M, K, static_cast<Layout>(variant / 2 % kLayouts), random);
    const bool accumulate = variant % 2;
    const int64_t stride = M + kRowsApart;
    std::vector<float> out(N * stride, kBeside);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t m = 0; m < M; ++m) out[n * stride + m] = accumulate ? 0.5f : NAN;
    }
    PanelProductArgs args{.dtype = kDType,
                          .K = K,
                          .a = a.operand,
                          .b = b.operand,
                          .out = out.data(),
                          .out_stride = stride,
                          .accumulate = accumulate,
                          .workspace = nullptr};
    const auto bytes =
        static_cast<size_t>(tested::panel_product_workspace(args, members) + 63) / 64 * 64;
    const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, bytes), std::free);
    args.workspace = memory.get();
    tested::panel_product_prepare(args, members);
    for (int64_t member = 0; member < members; ++member)
      tested::panel_product(args, members, member);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t m = 0; m < M; ++m) {
        double exact = accumulate ? 0.5 : 0, size = exact;
        for (int64_t k = 0; k < K; ++k) {
          exact += a.at(n, k) * b.at(m, k);
          size += std::abs(a.at(n, k) * b.at(m, k));
        }
        const double off = std::abs(out[n * stride + m] - exact) / size * 0x1p24;
        if (!(off <= error)) error = off;
      }
      for (int64_t m = M; m < stride; ++m) beside += out[n * stride + m] != kBeside;
    }
  }
};

}  // namespace

int main() {
  if (!seqkern::cpu::has_unit()) return 1;
  Worst worst;
  for (const int64_t N : {1, 17, 32, 65}) {
    for (const int64_t K : {1, 33, 64, 545}) {
      for (const int64_t M : {1, 16, 33, 100}) {
        for (int variant = 0; variant < 6; ++variant)
          worst.check(N, K, M, variant, 1 + variant % 3);
      }
    }
  }
  // More threads than there are panels of either side.
  for (int variant = 0; variant < 6; ++variant) {
    worst.check(300, 70, 310, variant, 16);
    worst.check(330, 600, 300, variant, 64);
  }
  std::printf("error %g\nbeside %g\n", worst.error, worst.beside);
}
