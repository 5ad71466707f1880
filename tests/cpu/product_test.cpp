// The products of csrc/cpu/recurrent_product.h against sums in double, for one instruction set.
// Prints "name worst" lines: errors as multiples of 2^-24 of the sum of the products' magnitudes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/recurrent_product.h"
#include "unit.h"

using namespace seqkern;
using namespace seqkern::cpu::SEQKERN_ISA;

namespace {

constexpr int64_t kRowsApart = 3;  // more of out than of a block

template <class T>
struct Case {
  int64_t K, units, rows;
  int G;
  bool units_contiguous;
  int parts;
  double special = 0;  // an element of the left side
  bool add = false;    // to what is there

  // Worst error over all blocks, or NaN where a result is not as infinite as it should be.
  double worst() const {
    std::mt19937 random(static_cast<unsigned>(K * 131 + units * 17 + rows));
    std::normal_distribution<float> normal;
    const auto numbers = [&](int64_t n) {
      std::vector<T> values(n);
      for (T& v : values) store1(&v, normal(random));
      return values;
    };
    std::vector<T> left = numbers(rows * K), weight = numbers(G * units * K);
    if (special) store1(&left[K / 2], static_cast<float>(special));
    const int64_t k_stride = units_contiguous ? G * units : 1;
    const int64_t u_stride = units_contiguous ? 1 : K;
    PackedMatrix<float> w(K, units, G, rows, 2, parts);
    std::vector<float> packed(w.size() + 16), rows_of_left(rows * w.left_row() + 16);
    const auto aligned = [](std::vector<float>& v) {
      return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~63ull);
    };
    w.data = aligned(packed);
    float* a = aligned(rows_of_left);
    for (int64_t r = 0; r < rows; ++r) w.put_row(a + r * w.left_row(), left.data() + r * K);
    double worst = 0;
    for (int64_t block = 0; block < w.blocks; ++block) {
      w.pack(block, weight.data(), k_stride, u_stride);
      const int64_t lanes = w.width_of(block) * kLanes<float>;
      const int64_t stride = G * lanes + kRowsApart;
      std::vector<float> out(rows * stride + 16, -1.25f);
      product(w, block, a, w.left_row(), rows, out.data(), stride, add);
      for (int64_t r = 0; r < rows; ++r) {
        for (int gate = 0; gate < G; ++gate) {
          for (int64_t i = 0; i < w.units_of(block); ++i) {
            const int64_t u = gate * units + w.first_unit(block) + i;
            double exact = add ? -1.25 : 0, size = std::abs(exact);
            for (int64_t k = 0; k < K; ++k) {
              const double x = load1(&left[r * K + k]);
              const double y = load1(&weight[k * k_stride + u * u_stride]);
              exact += x * y, size += std::abs(x * y);
            }
            const double got = out[r * stride + gate * lanes + i];
            if (std::isinf(exact)) {
              if (got != exact) return NAN;
            } else if (!(std::abs(got - exact) <= 1e30)) {
              return NAN;
            } else {
              worst = std::max(worst, std::abs(got - exact) / size * 0x1p24);
            }
          }
        }
      }
    }
    return worst;
  }
};

template <class T>
void print(const char* name) {
  const ProductSession session;
  for (const bool tiles : {false, true}) {
    if (tiles && !(kHasTiles && kParts<T>)) break;
    double worst = 0, infinite = 0;
    for (const int64_t K : {1, 7, 31, 32, 33, 96, 257}) {
      for (const int64_t units : {1, 16, 31, 64, 100}) {
        for (const int64_t rows : {1, 5, 8, 16}) {
          for (const int G : {1, 3, 4}) {
            const Case<T> c{K, units, rows, G, (K + units + rows) % 2 == 0, tiles ? kParts<T> : 0};
            Case<T> added = c;
            added.add = true;
            worst = std::max({worst, c.worst(), added.worst()});
            Case<T> with_infinity = units % 2 ? c : added;
            with_infinity.special = -INFINITY;
            if (!(with_infinity.worst() <= 1e30)) ++infinite;
          }
        }
      }
    }
    std::printf("%s%s %g\n", name, tiles ? "_tiles" : "", worst);
    std::printf("%s%s_infinity_wrong %g\n", name, tiles ? "_tiles" : "", infinite);
  }
}

}  // namespace

int main() {
  if (!seqkern::cpu::has_unit()) return 1;
  print<float>("float");
  print<Half>("half");
  print<BFloat16>("bf16");
}
