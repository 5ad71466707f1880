// One step of a cell with its products, forward.
#include "cpu/cell_step_units.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T, class Cell>
struct Step {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int G = Cell::G, S = Cell::kSums;
  // A tile is kRows rows and kUnits units, or one row and both times as many units: each of its
  // sums has an accumulator, as many as there are lanes, which are then added up together.
  static constexpr int kRows = L >= 8 ? L / 4 : 1, kUnits = 4 / S;
  static constexpr int64_t kRowsTogether = 64;
  static constexpr int64_t kRowSize = S * kStepUnits;  // of sums

  const CellStepForwardArgs& args;
  const CellStepInputs& in;

  explicit Step(const CellStepForwardArgs& args) : args(args), in(args.in) {}

  // Units [16 item, 16 item + 16) of all rows.
  void run(int64_t item) const {
    const int64_t first = item * kStepUnits;
    const int64_t units = in.H - first < kStepUnits ? in.H - first : kStepUnits;
    alignas(64) Acc a[kRowsTogether * kRowSize];  // [row, sum, unit]
    for (int64_t b = 0; b < in.B; b += kRowsTogether) {
      const int64_t rows = in.B - b < kRowsTogether ? in.B - b : kRowsTogether;
      if (rows > 1) {
        // The weights of a unit, all gates, stay in first-level cache while the rows pass. Where
        // rows are left for no whole tile the last one stands in for the others.
        for (int64_t u = 0; u < units; u += kUnits) {
          for (int64_t r = 0; r < rows; r += kRows) {
            products<kRows, kUnits>(b + r, least(kRows, rows - r), first + u,
                                    least(kUnits, units - u), a + r * kRowSize + u);
          }
        }
      } else {
        constexpr int64_t kMore = kRows * kUnits;
        for (int64_t u = 0; u < units; u += kMore) {
          products<1, kMore>(b, 1, first + u, least(kMore, units - u), a + u);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t v = 0; v < units; v += L) {
          const StepUnits<T> at{in.H, first + v, least(L, units - v)};
          Cell::template forward<T>(args, b + r, at, [&](int s) __attribute__((always_inline)) {
            return load(a + r * kRowSize + s * kStepUnits + v);
          });
        }
      }
    }
  }

  SEQKERN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  // out [R, S, kStepUnits]: the sums of units u .. u + U - 1 and rows b .. b + R - 1. Of both, only
  // the first `rows` and `units` are there.
  template <int R, int U>
  void products(int64_t b, int64_t rows, int64_t u, int64_t units, Acc* out) const {
    V sum[R * S * U] = {};
    add<R, U, false>(sum, in.x, b, rows, in.w_ih, in.I, u, units);
    if (in.h0) add<R, U, true>(sum, in.h0, b, rows, in.w_hh, in.H, u, units);
    constexpr int n = R * S * U;
    if constexpr (n % L == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < n; i += L) sum[i / L] = hsums(sum + i);
      for (int i = 0; i < n; ++i) out[i / U * kStepUnits + i % U] = sum[i / L][i % L];
    } else {
      for (int i = 0; i < n; ++i) out[i / U * kStepUnits + i % U] = hsum(sum[i]);
    }
  }

  // sum [R, S, U] += the products of rows `x` [B, K] and `w` [G H, K], lane by lane of k.
  template <int R, int U, bool kRecurrent>
  __attribute__((always_inline)) void add(V* sum, const void* x, int64_t b, int64_t rows,
                                          const void* w, int64_t K, int64_t u,
                                          int64_t units) const {
    const T* x_r[R];
    const T* w_g[G * U];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x_r[r] = static_cast<const T*>(x) + (b + (r < rows ? r : rows - 1)) * K;
    }
#pragma GCC unroll 16
    for (int i = 0; i < G * U; ++i) {
      const int64_t unit = u + (i % U < units ? i % U : units - 1);
      w_g[i] = static_cast<const T*>(w) + (i / U * in.H + unit) * K;
    }
    V total[R * G * U];
    const auto at = [&](int r, int i) __attribute__((always_inline)) -> V& {
      const int gate = i / U;
      return sum[(r * S + (kRecurrent ? Cell::recurrent_sum(gate) : gate)) * U + i % U];
    };
#pragma GCC unroll 16
    for (int i = 0; i < R * G * U; ++i) total[i] = at(i / (G * U), i % (G * U));
    const auto step = [&](auto read) __attribute__((always_inline)) {
      V x_k[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x_k[r] = read(x_r[r]);
#pragma GCC unroll 16
      for (int i = 0; i < G * U; ++i) {
        const V w_k = read(w_g[i]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r * G * U + i] += x_k[r] * w_k;
      }
    };
    int64_t k = 0;
    for (; k + L <= K; k += L) {
      step([&](const T* p) __attribute__((always_inline)) { return load(p + k); });
    }
    if (k < K) {
      step([&](const T* p) __attribute__((always_inline)) { return load_part<Acc>(p + k, K - k); });
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * G * U; ++i) at(i / (G * U), i % (G * U)) = total[i];
  }
};

}  // namespace

void cell_step_forward(const CellStepForwardArgs& args, int64_t begin, int64_t end) {
  dispatch_step(args.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    const Step<T, Cell> step(args);
    for (int64_t item = begin; item < end; ++item) step.run(item);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
