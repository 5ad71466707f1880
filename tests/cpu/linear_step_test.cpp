// csrc/cpu/linear_step_tiles.cpp against sums in double. Prints "name worst" lines: errors as
// multiples of 2^-24 of the sum of the magnitudes, how many outputs depend on the rows beside them,
// and how many of infinite inputs are not infinite.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/linear_step_plan.h"
#include "cpu/simd.h"
#include "unit.h"

namespace seqkern::cpu::SEQKERN_ISA {  // `tiles` is no instruction set of dispatch.cpp
SEQKERN_CPU_UNIT_KERNELS(SEQKERN_DECLARE_KERNEL)
}  // namespace seqkern::cpu::SEQKERN_ISA

using namespace seqkern;
using namespace seqkern::cpu::SEQKERN_ISA;

namespace {

constexpr int64_t kBeside = 5;  // numbers between rows, which are NaN

template <class T>
struct Matrix {
  int64_t stride;
  std::vector<T> data;

  Matrix(int64_t rows, int64_t columns, float scale, std::mt19937& random)
      : stride(columns + kBeside), data(rows * stride) {
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < rows * stride; ++i) {
      store1(&data[i], i % stride < columns ? normal(random) : NAN);
    }
  }
  const T* row(int64_t i) const { return data.data() + i * stride; }
  T* row(int64_t i) { return data.data() + i * stride; }
};

template <class T>
std::vector<T> run(const Matrix<T>& x, int64_t first, int64_t N, int64_t K,
                   const Matrix<BFloat16>& w, int64_t M, bool gated) {
  std::vector<T> y(N * M);
  LinearStepArgs args{.dtype = std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16,
                      .weight_dtype = DType::kBFloat16,
                      .N = N,
                      .K = K,
                      .M = M,
                      .x = x.row(first),
                      .x_rows = {.dims = 1, .size = {N}, .stride = {x.stride}},
                      .norm = StepNorm::kNone,
                      .norm_weight = nullptr,
                      .norm_bias = nullptr,
                      .eps = 0,
                      .weight = w.row(0),
                      .weight_stride = w.stride,
                      .bias = nullptr,
                      .activation = Activation::kNone,
                      .gated = gated,
                      .residual = nullptr,
                      .residual_rows = {},
                      .y = y.data(),
                      .workspace = nullptr};
  const cpu::LinearStepTiles plan(args);
  const auto bytes = static_cast<size_t>(plan.bytes + 63) / 64 * 64;
  const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, bytes), std::free);
  __builtin_memset(memory.get(), 0xff, bytes);  // NaN
  args.workspace = memory.get();
  linear_step_tiles_prepare(args, 0, plan.blocks);
  const int64_t groups = cpu::LinearStepPlan(args).groups;
  for (int64_t group = 0; group < groups; group += 5) {  // one of four tiles, one of one
    linear_step_tiles(args, group, group + 5 < groups ? group + 5 : groups);
  }
  return y;
}

struct Worst {
  double error = 0, together = 0, infinite = 0;

  template <class T>
  void check(int64_t N, int64_t K, int64_t M, bool gated) {
    std::mt19937 random(static_cast<unsigned>(N * 131 + K * 17 + M));
    Matrix<T> x(N, K, 1, random);
    const Matrix<BFloat16> w(gated ? 2 * M : M, K, 1, random);
    const std::vector<T> y = run(x, 0, N, K, w, M, gated);
    const double rounding = std::is_same_v<T, float> ? 0 : 0x1p-8;
    for (int64_t n = 0; n < N; ++n) {
      const auto product = [&](int64_t m, double* size) {
        double sum = 0;
        *size = 0;
        for (int64_t k = 0; k < K; ++k) {
          const double p = static_cast<double>(load1(x.row(n) + k)) * load1(w.row(m) + k);
          sum += p;
          *size += std::abs(p);
        }
        return sum;
      };
      for (int64_t m = 0; m < M; ++m) {
        double size, other = 1, up = 1;
        double exact = product(m, &size);
        if (gated) {
          up = product(M + m, &other);
          exact *= up;
        }
        const double off = std::abs(load1(&y[n * M + m]) - exact) - rounding * std::abs(exact);
        if (!(off / (size * other) * 0x1p24 <= error)) error = off / (size * other) * 0x1p24;
      }
    }
    const int64_t some = N / 2;
    const std::vector<T> alone = run(x, some, 1, K, w, M, gated);
    for (int64_t m = 0; m < M; ++m) together += load1(&alone[m]) != load1(&y[some * M + m]);
    store1(x.row(0), INFINITY);
    if (gated) return;
    const std::vector<T> of_infinity = run(x, 0, N, K, w, M, gated);
    for (int64_t m = 0; m < M; ++m) {
      const float expected = load1(w.row(m)) > 0 ? INFINITY : -INFINITY;
      infinite += load1(&of_infinity[m]) != expected;
      if (N > 1) infinite += load1(&of_infinity[M + m]) != load1(&y[M + m]);
    }
  }
};

}  // namespace

int main() {
  if (!seqkern::cpu::has_unit()) return 1;
  Worst worst;
  for (const int64_t N : {1, 2, 15, 16, 17, 50, 150}) {
    for (const int64_t K : {1, 31, 32, 33, 100, 300}) {
      for (const int64_t M : {1, 16, 17, 64, 83, 150}) {
        if (N * K * M > 1500000) continue;
        worst.check<float>(N, K, M, (N + K + M) % 3 == 0);
        worst.check<BFloat16>(N, K, M, (N + K + M) % 3 == 1);
      }
    }
  }
  std::printf("error %g\ntogether %g\ninfinite %g\n", worst.error, worst.together, worst.infinite);
}
