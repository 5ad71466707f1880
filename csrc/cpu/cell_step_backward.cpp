// One step of a cell with its products, backward: first the gradients at the gates, then all
// products with them.
#include "cpu/cell_step_units.h"
#include "cpu/depth_product.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// The products of one step with the gradients d [B, d_row] at its gates, whose number is not part
// of the type: these tiles are most of what there is to compile.
template <class T>
struct GateProducts {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kWeightRows = 4 * kTileRows;  // of a weight's gradient, an item
  static constexpr int64_t kItemsOfMember = 2;           // at least, so that threads end together
  static constexpr int64_t kSums = 1 << 15;              // of an item, most
  static constexpr int64_t kLarge = 1 << 20;  // numbers of the weights that caches do not hold well

  int64_t B;
  int64_t gates;  // of all units: rows of the weights
  int64_t d_row;
  int64_t panel;  // columns of an item of dx and dh0
  bool by_depth;  // whether all rows of the batch go down the weights together

  GateProducts(const CellStepInputs& in, int64_t G, int64_t members)
      : B(in.B),
        gates(G * in.H),
        d_row(padded<Acc>(G * in.H)),
        panel((B == 1 ? 8 : kTileVectors) * L),
        by_depth(B > kTileRows && gates * (in.I + in.H) >= kLarge) {
    if (by_depth) {
      const int64_t share = (in.I + in.H) / (members * kItemsOfMember), most = kSums / B;
      const int64_t tiles = (share < most ? share : most) / panel;
      if (tiles > 1) panel *= tiles;
    }
  }
  int64_t scratch_size() const { return by_depth ? DepthProduct<T>::scratch_size(B, panel) : 0; }

  // Lanes beyond the last gate are not written.
  void bias_gradient(int64_t j, int64_t end, const Acc* d, void* out) const {
    for (; j < end; j += L) {
      V sum = {};
      for (int64_t b = 0; b < B; ++b) sum += load(d + b * d_row + j);
      store_part<Acc>(static_cast<T*>(out) + j, sum, end - j < L ? end - j : L);
    }
  }

  // Columns of d w (+ more [B, width]) for w [G H, width]: rows of w are contiguous along them.
  void row_gradient(int64_t item, const Acc* d, const void* w, int64_t width, const Acc* more,
                    void* out, Acc* scratch) const {
    const int64_t first = item * panel;
    const int64_t columns = width - first < panel ? width - first : panel;
    const T* w_i = static_cast<const T*>(w) + first;
    T* to = static_cast<T*>(out) + first;
    if (more) more += first;
    if (B == 1) {
      times<1, 8>(d, 0, 1, w_i, width, gates, columns, to, 0, more);
      return;
    }
    const int64_t whole = by_depth ? columns / L * L : 0;
    if (whole) whole_vectors(d, w_i, width, whole, more, to, scratch);
    if (whole == columns) return;
    for (int64_t b = 0; b < B; b += kTileRows) {
      const int64_t rows = B - b < kTileRows ? B - b : kTileRows;
      with_tile_rows(rows, [&](auto count) __attribute__((always_inline)) {
        times<decltype(count)::value, kTileVectors>(
            d + b * d_row, d_row, 1, w_i + whole, width, gates, columns - whole,
            to + b * width + whole, width, more ? more + b * width + whole : nullptr);
      });
    }
  }

  void whole_vectors(const Acc* d, const T* w, int64_t width, int64_t columns, const Acc* more,
                     T* out, Acc* scratch) const {
    const DepthProduct<T> product{.B = B,
                                  .K = gates,
                                  .d = d,
                                  .d_row = d_row,
                                  .w = w,
                                  .w_row = width,
                                  .columns = columns,
                                  .row = panel,
                                  .scratch = scratch};
    const Acc* sums = product.run();
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < columns; i += L) {
        V v = load(sums + b * panel + i);
        if (more) v += load(more + b * width + i);
        store(out + b * width + i, v);
      }
    }
  }

  // Rows [j, end) of d^T x for x [B, width]; zeros without x.
  void weight_gradient(int64_t j, int64_t end, const Acc* d, const void* x, int64_t width,
                       void* out) const {
    T* to = static_cast<T*>(out);
    if (!x) {
      __builtin_memset(to + j * width, 0, (end - j) * width * sizeof(T));
      return;
    }
    if (B == 1) {
      const T* from = static_cast<const T*>(x);
      for (; j < end; ++j) outer_row(d[j], from, width, to + j * width);
      return;
    }
    for (; j < end; j += kTileRows) {
      const int64_t rows = end - j < kTileRows ? end - j : kTileRows;
      with_tile_rows(rows, [&](auto count) __attribute__((always_inline)) {
        for (int64_t i = 0; i < width; i += kPanel<Acc>) {
          const int64_t columns = width - i < kPanel<Acc> ? width - i : kPanel<Acc>;
          times<decltype(count)::value, kTileVectors>(d + j, 1, d_row, static_cast<const T*>(x) + i,
                                                      width, B, columns, to + j * width + i, width,
                                                      nullptr);
        }
      });
    }
  }

  // out = d x, a whole row at a time: what it costs is writing, which memory takes best in order.
  static void outer_row(Acc d, const T* x, int64_t width, T* out) {
    const V d_v = splat<V>(d);
    int64_t i = 0;
    for (; i + L <= width; i += L) store(out + i, d_v * load(x + i));
    if (i < width) {
      store_part<Acc>(out + i, d_v * load_part<Acc>(x + i, width - i), width - i);
    }
  }

  // out [R, columns] = a [R, K] b [K, columns] (+ more, whose rows are out_stride apart, too);
  // columns up to NV vectors.
  template <int R, int NV>
  static void times(const Acc* a, int64_t row_stride, int64_t k_stride, const T* b,
                    int64_t b_stride, int64_t K, int64_t columns, T* out, int64_t out_stride,
                    const Acc* more) {
    const auto put = [&](int r, int64_t i, V v, int64_t count) __attribute__((always_inline)) {
      const int64_t at = r * out_stride + i;
      if (more) v += load_part<Acc>(more + at, count);
      store_part<Acc>(out + at, v, count);
    };
    const auto of_vectors = [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      alignas(64) Acc sums[R * kVectors * L];
      multiply_in_chains<Acc, R, kVectors>(sums, kVectors * L, false, a, row_stride, k_stride, b, K,
                                           b_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          put(r, j * L, load(sums + (r * kVectors + j) * L), L);
        }
      }
    };
    const int64_t whole = columns / L, i = whole * L;
    if (whole) with_vectors<NV>(whole, of_vectors);
    if (i < columns) {
      // A part of a vector.
      const int64_t count = columns - i;
      V total[R] = {};
      for (int64_t k = 0; k < K;) {
        const int64_t end = K - k < kProductChain ? K : k + kProductChain;
        V sum[R] = {};
        for (; k < end; ++k) {
          const V b_k = load_part<Acc>(b + k * b_stride + i, count);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r] += splat<V>(a[r * row_stride + k * k_stride]) * b_k;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[r] += sum[r];
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) put(r, i, total[r], count);
    }
  }
};

template <class T, class Cell>
struct StepBackward {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int G = Cell::G;
  // Whether the gradients at the products with x and with h differ, and some of dh passes the
  // gates.
  static constexpr bool kApart = Cell::kSums > G;
  static constexpr int64_t kWeightRows = GateProducts<T>::kWeightRows;

  const CellStepBackwardArgs& args;
  const CellStepInputs& in;
  int64_t members;
  Arena arena;
  GateProducts<T> products;
  int64_t items[2];
  Counter* counters;
  // Gradients at the products with x and with h [B, d_row], as the products of backward read them:
  // rounded to T.
  Acc* d[2];
  Acc* past;     // [B, H] what h0 gets past the gates, if that is wanted
  Acc* scratch;  // [members, products.scratch_size()]

  StepBackward(const CellStepBackwardArgs& args, int64_t members, char* base)
      : args(args),
        in(args.in),
        members(members),
        arena{base},
        products(in, G, members),
        items{ceil_div<int64_t>(in.H, kStepUnits),
              (args.dx ? ceil_div<int64_t>(in.I, products.panel) : 0) +
                  (args.dh0 ? ceil_div<int64_t>(in.H, products.panel) : 0) +
                  ceil_div<int64_t>(G * in.H, kWeightRows)} {
    counters = arena.take<Counter>(counter_count());
    d[0] = arena.take<Acc>(in.B * products.d_row);
    d[1] = kApart ? arena.take<Acc>(in.B * products.d_row) : d[0];
    past = kApart && args.dh0 ? arena.take<Acc>(in.B * in.H) : nullptr;
    scratch = arena.take<Acc>(members * padded<Acc>(products.scratch_size()));
  }

  int64_t counter_count() const { return 1 + items[0] + items[1]; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    run_chain(Chain{1, {items[0], items[1]}, counters}, member, members,
              [&](int64_t, int phase, int64_t item) {
                if (phase == 0) {
                  gate_gradients_of(item);
                } else {
                  product_of(item, scratch + member * padded<Acc>(products.scratch_size()));
                }
              });
  }

  void gate_gradients_of(int64_t item) const {
    const int64_t H = in.H, first = item * kStepUnits;
    const int64_t end = H - first < kStepUnits ? H : first + kStepUnits;
    for (int64_t b = 0; b < in.B; ++b) {
      for (int64_t u = first; u < end; u += L) {
        const StepUnits<T> at{H, u, end - u < L ? end - u : L};
        const auto keep = [&](int i, int gate, V v) __attribute__((always_inline)) {
          store_part<Acc>(d[i] + b * products.d_row + gate * H + u, v, at.count);
        };
        const V rest =
            Cell::template backward<T>(args, b, at, [&](int q, V v) __attribute__((always_inline)) {
              const V as_read = rounded<T, Acc>(v);
              if (q < G) keep(0, q, as_read);
              if (!kApart) return;
              for (int g = 0; g < G; ++g) {
                if (Cell::recurrent_sum(g) == q) keep(1, g, as_read);
              }
            });
        if (past) store_part<Acc>(past + b * H + u, rest, at.count);
      }
    }
  }

  void product_of(int64_t item, Acc* scratch) const {
    if (args.dx) {
      const int64_t panels = ceil_div<int64_t>(in.I, products.panel);
      if (item < panels)
        return products.row_gradient(item, d[0], in.w_ih, in.I, nullptr, args.dx, scratch);
      item -= panels;
    }
    if (args.dh0) {
      const int64_t panels = ceil_div<int64_t>(in.H, products.panel);
      if (item < panels)
        return products.row_gradient(item, d[1], in.w_hh, in.H, past, args.dh0, scratch);
      item -= panels;
    }
    const int64_t j = item * kWeightRows;
    const int64_t end = G * in.H - j < kWeightRows ? G * in.H : j + kWeightRows;
    if (args.dw_ih) products.weight_gradient(j, end, d[0], in.x, in.I, args.dw_ih);
    if (args.dw_hh) products.weight_gradient(j, end, d[1], in.h0, in.H, args.dw_hh);
    if (args.db_ih) products.bias_gradient(j, end, d[0], args.db_ih);
    if (args.db_hh) products.bias_gradient(j, end, d[1], args.db_hh);
  }
};

}  // namespace

int64_t cell_step_backward_workspace(const CellStepBackwardArgs& args, int64_t members) {
  return dispatch_step(args.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    return StepBackward<T, Cell>(args, members, nullptr).arena.used;
  });
}
void cell_step_backward_prepare(const CellStepBackwardArgs& args, int64_t members) {
  dispatch_step(args.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    StepBackward<T, Cell>(args, members, static_cast<char*>(args.workspace)).prepare();
  });
}
void cell_step_backward(const CellStepBackwardArgs& args, int64_t members, int64_t member) {
  dispatch_step(args.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    StepBackward<T, Cell>(args, members, static_cast<char*>(args.workspace)).run(member);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
