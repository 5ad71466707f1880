// One step of an LSTM with its products, forward.
#include "cpu/kernels.h"
#include "cpu/lstm_step_cell.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct Step {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  // Rows of a tile, whose four gates of a unit have an accumulator each: as many accumulators as
  // lanes, which are then summed up together.
  static constexpr int kRows = L >= 8 ? L / 4 : 1;
  static constexpr int64_t kRowsTogether = 64;
  static constexpr int64_t kRowSize = 4 * kStepUnits;  // of sums

  const LstmStepForwardArgs& args;
  const LstmStepInputs& in;

  explicit Step(const LstmStepForwardArgs& args) : args(args), in(args.in) {}

  // Units [16 item, 16 item + 16) of all rows.
  void run(int64_t item) const {
    const int64_t first = item * kStepUnits;
    const int64_t units = in.H - first < kStepUnits ? in.H - first : kStepUnits;
    alignas(64) Acc a[kRowsTogether * kRowSize];  // [row, gate, unit]
    for (int64_t b = 0; b < in.B; b += kRowsTogether) {
      const int64_t rows = in.B - b < kRowsTogether ? in.B - b : kRowsTogether;
      if (rows > 1) {
        // The weights of a unit, all gates, stay in first-level cache while the rows pass. Where
        // rows are left for no whole tile the last one stands in for the others.
        for (int64_t u = 0; u < units; ++u) {
          for (int64_t r = 0; r < rows; r += kRows) {
            const int64_t some = rows - r < kRows ? rows - r : kRows;
            products<kRows, 1>(b + r, some, first + u, 1, a + r * kRowSize + u);
          }
        }
      } else {
        for (int64_t u = 0; u < units; u += kRows) {
          const int64_t some = units - u < kRows ? units - u : kRows;
          products<1, kRows>(b, 1, first + u, some, a + u);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        step_cell<T>(args, b + r, first, units,
                     [&](int64_t gate, int64_t v) __attribute__((always_inline)) {
                       return load(a + r * kRowSize + gate * kStepUnits + v);
                     });
      }
    }
  }

  // out [R, 4, kStepUnits]: the four gates of units u .. u + U - 1 and rows b .. b + R - 1. Of
  // both, only the first `rows` and `units` are there.
  template <int R, int U>
  void products(int64_t b, int64_t rows, int64_t u, int64_t units, Acc* out) const {
    V sum[R * 4 * U] = {};
    add<R, U>(sum, in.x, b, rows, in.w_ih, in.I, u, units);
    if (in.h0) add<R, U>(sum, in.h0, b, rows, in.w_hh, in.H, u, units);
    constexpr int n = R * 4 * U;
    if constexpr (n % L == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < n; i += L) sum[i / L] = hsums(sum + i);
      for (int i = 0; i < n; ++i) out[i / U * kStepUnits + i % U] = sum[i / L][i % L];
    } else {
      for (int i = 0; i < n; ++i) out[i / U * kStepUnits + i % U] = hsum(sum[i]);
    }
  }

  // sum [R, 4, U] += the products of rows `x` [B, K] and `w` [4 H, K], lane by lane of k.
  template <int R, int U>
  __attribute__((always_inline)) void add(V* sum, const void* x, int64_t b, int64_t rows,
                                          const void* w, int64_t K, int64_t u,
                                          int64_t units) const {
    const T* x_r[R];
    const T* w_g[4 * U];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x_r[r] = static_cast<const T*>(x) + (b + (r < rows ? r : rows - 1)) * K;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4 * U; ++i) {
      const int64_t unit = u + (i % U < units ? i % U : units - 1);
      w_g[i] = static_cast<const T*>(w) + (i / U * in.H + unit) * K;
    }
    V total[R * 4 * U];
#pragma GCC unroll 16
    for (int i = 0; i < R * 4 * U; ++i) total[i] = sum[i];
    const auto step = [&](auto read) __attribute__((always_inline)) {
      V x_k[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x_k[r] = read(x_r[r]);
#pragma GCC unroll 16
      for (int i = 0; i < 4 * U; ++i) {
        const V w_k = read(w_g[i]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r * 4 * U + i] += x_k[r] * w_k;
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
    for (int i = 0; i < R * 4 * U; ++i) sum[i] = total[i];
  }
};

}  // namespace

void lstm_step_forward(const LstmStepForwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.in.dtype, [&](auto tag) {
    const Step<typename decltype(tag)::type> step(args);
    for (int64_t item = begin; item < end; ++item) step.run(item);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
