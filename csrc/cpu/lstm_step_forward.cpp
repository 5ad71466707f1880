// One step of an LSTM with its products, forward.
#include "cpu/kernels.h"
#include "cpu/lstm.h"
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
  static constexpr int64_t kPackColumns = 64;  // of the weights at a time
  static constexpr int64_t kRowsTogether = 64;
  static constexpr int64_t kRowSize = 4 * kStepUnits;  // of sums
  // A panel has the units of as many gates as make four vectors.
  static constexpr int kPanelVectors =
      kStepUnits / L < 4 && kVectorBytes == 64 ? 4 : kStepUnits / L;
  static constexpr int64_t kPanelWidth = kPanelVectors * L;
  static constexpr int kPackTile = (kVectorBytes == 64 ? 24 : 12) / kPanelVectors < 1
                                       ? 1
                                       : (kVectorBytes == 64 ? 24 : 12) / kPanelVectors;

  const LstmStepForwardArgs& args;
  const LstmStepInputs& in;

  explicit Step(const LstmStepForwardArgs& args) : args(args), in(args.in) {}

  // From so many rows on, packing the weights on the way costs less than a tile without broadcasts,
  // which needs registers for 16 sums, and whole vectors that are read as they are.
  int64_t pack_rows() const {
    const bool whole = in.I % L == 0 && in.H % L == 0;
    return L >= 16 && sizeof(T) == sizeof(Acc) && whole ? 32 : 6;
  }

  // Units [16 item, 16 item + 16) of all rows.
  void run(int64_t item) const {
    const int64_t first = item * kStepUnits;
    const int64_t units = in.H - first < kStepUnits ? in.H - first : kStepUnits;
    alignas(64) Acc a[kRowsTogether * kRowSize];  // [row, gate, unit]
    for (int64_t b = 0; b < in.B; b += kRowsTogether) {
      const int64_t rows = in.B - b < kRowsTogether ? in.B - b : kRowsTogether;
      __builtin_memset(a, 0, rows * kRowSize * sizeof(Acc));
      if (in.B >= pack_rows()) {
        packed_products(b, rows, in.x, in.I, in.w_ih, first, units, a);
        if (in.h0) packed_products(b, rows, in.h0, in.H, in.w_hh, first, units, a);
      } else if (rows > 1) {
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
      for (int64_t r = 0; r < rows; ++r) cell(b + r, first, units, a + r * kRowSize);
    }
  }

  // a [rows, 4, kStepUnits] += rows b .. of x [B, K] times the item's rows of w [4 H, K], of which
  // some columns at a time are turned into panels that stay in cache.
  void packed_products(int64_t b, int64_t rows, const void* x, int64_t K, const void* w,
                       int64_t first, int64_t units, Acc* a) const {
    alignas(64) Acc panels[kPackColumns * kRowSize];  // [panel, k, kPanelWidth]
    alignas(64) Acc copy[kRowsTogether * kPackColumns];
    for (int64_t k = 0; k < K; k += kPackColumns) {
      const int64_t columns = K - k < kPackColumns ? K - k : kPackColumns;
      for (int64_t v = 0; v < kRowSize; v += L) {
        const int64_t gate = v / kStepUnits, u = v % kStepUnits;
        const T* from = static_cast<const T*>(w) + (gate * in.H + first + u) * K + k;
        const int64_t count = units - u < 0 ? 0 : units - u < L ? units - u : L;
        pack_lanes<Acc>(panels + v / kPanelWidth * kPanelWidth * columns + v % kPanelWidth,
                        kPanelWidth, from, 1, K, columns, count);
      }
      const T* x_k = static_cast<const T*>(x) + b * K + k;
      const Acc* rows_k;
      int64_t stride = K;
      if constexpr (sizeof(T) == sizeof(Acc)) {
        rows_k = x_k;
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          copy_row<T>(copy + r * kPackColumns, x_k + r * K, 0, columns);
        }
        rows_k = copy, stride = kPackColumns;
      }
      const int64_t tiles = (rows + kPackTile - 1) / kPackTile;
      for (int64_t p = 0; p < kRowSize / kPanelWidth; ++p) {
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t r = rows * i / tiles, end = rows * (i + 1) / tiles;
          with_tile_rows<kPackTile>(end - r, [&](auto count) __attribute__((always_inline)) {
            add_tile<decltype(count)::value>(rows_k + r * stride, stride,
                                             panels + p * kPanelWidth * columns, columns,
                                             a + r * kRowSize + p * kPanelWidth);
          });
        }
      }
    }
  }

  template <int R>
  static void add_tile(const Acc* x, int64_t row_stride, const Acc* panel, int64_t K, Acc* sum) {
    Tile<Acc, R, kPanelVectors> tile;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kPanelVectors; ++j) tile.c[r][j] = load(sum + r * kRowSize + j * L);
    }
    multiply_add(tile, x, row_stride, 1, panel, K);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kPanelVectors; ++j) store(sum + r * kRowSize + j * L, tile.c[r][j]);
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

  // The pointwise part of row b, whose gates' products are a [4, kStepUnits].
  void cell(int64_t b, int64_t first, int64_t units, const Acc* a) const {
    const int64_t H = in.H;
    const auto row = [&](const void* rows, int64_t n) {
      return rows ? static_cast<const T*>(rows) + n * H + first : nullptr;
    };
    const T* c0 = row(in.c0, b);
    T* gates = args.gates ? static_cast<T*>(args.gates) + 4 * b * H + first : nullptr;
    T* c_b = static_cast<T*>(args.c) + b * H + first;
    T* h_b = static_cast<T*>(args.h) + b * H + first;
    for (int64_t v = 0; v < units; v += L) {
      const int64_t count = units - v < L ? units - v : L;
      const auto input = [&](int64_t gate) __attribute__((always_inline)) {
        V sum = load(a + gate * kStepUnits + v);
        if (in.b_ih) sum += load_part<Acc>(row(in.b_ih, gate) + v, count);
        if (in.b_hh) sum += load_part<Acc>(row(in.b_hh, gate) + v, count);
        return sum;
      };
      const Gates<Acc> y = activate<Acc>({input(0), input(1), input(2), input(3)});
      const auto [c, m] = next_state<Acc>(y, c0 ? load_part<Acc>(c0 + v, count) : V{});
      store_part<Acc>(c_b + v, c, count);
      store_part<Acc>(h_b + v, m, count);
      if (!gates) continue;
      store_part<Acc>(gates + v, y.i, count);
      store_part<Acc>(gates + H + v, y.f, count);
      store_part<Acc>(gates + 2 * H + v, y.g, count);
      store_part<Acc>(gates + 3 * H + v, y.o, count);
    }
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
