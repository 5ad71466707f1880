// Softmax-cross-entropy on the CPU of few classes, without options but their weights: a lane of a
// vector is a row, its class is found by comparing, and its loss is computed in its lane, too,
// which is where a row of few classes spends its time. Rows that do not lie side by side are copied
// so.
#include "cpu/cross_entropy_columns.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// The most classes for which copying rows takes less time than each row by itself: forward, where a
// row by itself waits for its logarithm, and backward, which copies both ways.
constexpr int64_t kCopied = 24, kCopiedBack = 12;

// A block of rows [V, kMostVectors * L], and what a lane of it is in memory.
template <class Acc>
struct Block {
  static constexpr int64_t L = kLanes<Acc>, kRows = kMostVectors * L;
  static constexpr int64_t kWholeVectors = (kCopied + L - 1) / L * L;  // of one row
  alignas(64) Acc lanes[kCopied * kRows];

  template <class T>
  void read(const CrossEntropyInputs& in, int64_t n, int64_t count) {
    const T* logits = static_cast<const T*>(in.logits);
    alignas(64) Acc converted[kWholeVectors];
    for (int64_t i = 0; i < count; ++i) {
      const T* row = logits + in.logits_rows.offset(n + i);
      const Acc* from;
      if constexpr (std::is_same_v<T, Acc>) {
        from = row;
      } else {
        for (int64_t v = 0; v < in.V; v += L) {
          store(converted + v, load_part<Acc>(row + v, in.V - v));
        }
        from = converted;
      }
      for (int64_t v = 0; v < in.V; ++v) lanes[v * kRows + i] = from[v];
    }
  }
  template <class T>
  void write(const CrossEntropyInputs& in, void* dlogits, int64_t n, int64_t count) const {
    alignas(64) Acc exact[kWholeVectors];
    T* row = static_cast<T*>(dlogits) + n * in.V;
    for (int64_t i = 0; i < count; ++i, row += in.V) {
      Acc* to;
      if constexpr (std::is_same_v<T, Acc>) {
        to = row;
      } else {
        to = exact;
      }
      for (int64_t v = 0; v < in.V; ++v) to[v] = lanes[v * kRows + i];
      if constexpr (!std::is_same_v<T, Acc>) {
        for (int64_t v = 0; v < in.V; v += L) store_part<Acc>(row + v, load(exact + v), in.V - v);
      }
    }
  }
};

template <bool kWhole, bool kWeight, class T, int NV>
void forward_few(const CrossEntropyForwardArgs& a, const Columns<T, NV>& c) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  V y[NV], max[NV], sum[NV] = {}, x_y[NV] = {}, w_y[NV];
  c.template classes<kWhole>(y);
#pragma GCC unroll 4
  for (int u = 0; u < NV; ++u) max[u] = splat<V>(lowest<Acc>()), w_y[u] = splat<V>(Acc(1));
  for (int64_t v = 0; v < a.in.V; ++v) {
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) max[u] = vmax(max[u], c.template raw<kWhole>(v, u));
  }
  for (int64_t v = 0; v < a.in.V; ++v) {
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) {
      const V x = c.template raw<kWhole>(v, u);
      sum[u] += exp_nonpositive<Acc>(x - max[u]);
      const auto is_its = y[u] == static_cast<Acc>(v);
      x_y[u] = select(is_its, x, x_y[u]);
      if (kWeight) w_y[u] = select(is_its, splat<V>(c.o.weight[v]), w_y[u]);
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < NV; ++u) {
    using I = typename VecTraits<Acc>::I;
    const I none = y[u] < Acc(0);
    // In bits: g++ 12 fails on a condition around a selection by `none`.
    const I kept = ~none | -static_cast<decltype(I{}[0] + 0)>(a.lse != nullptr);
    V m = max[u], log_sum = log_nonnegative<Acc>(sum[u]);
    const V loss = select(none, V{}, w_y[u] * (log_sum + (m - x_y[u])));
    m = bitcast<V>(bitcast<I>(m) & kept);
    log_sum = bitcast<V>(bitcast<I>(log_sum) & kept);
    const auto write = [&](void* to, V value) __attribute__((always_inline)) {
      Acc* p = static_cast<Acc*>(to) + c.n + u * L;
      kWhole ? store(p, value) : store_part<Acc>(p, value, c.lanes(u));
    };
    write(a.row_max, m);
    write(a.row_log_sum, log_sum);
    if (a.lse) write(a.lse, m + log_sum);
    write(a.row_loss, loss);
  }
}

template <bool kWhole, bool kWeight, class T, int NV>
void backward_few(const CrossEntropyBackwardArgs& a, const Columns<T, NV>& c, T* dx,
                  int64_t dx_stride) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  const Acc* norms = static_cast<const Acc*>(a.norm);
  const Acc norm = norms ? norms[0] : Acc(1);
  const auto of_rows = [&](const void* from, int u) __attribute__((always_inline)) {
    return load_part<Acc>(static_cast<const Acc*>(from) + c.n + u * L, c.lanes(u));
  };
  V y[NV], max[NV], log_sum[NV], g[NV], x_y[NV] = {}, w_y[NV], of_class[NV];
  c.template classes<kWhole>(y);
  for (int u = 0; u < NV; ++u) w_y[u] = splat<V>(Acc(1));
  for (int64_t v = 0; v < in.V; ++v) {
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) {
      const V x = c.template raw<kWhole>(v, u);
      const auto is_its = y[u] == static_cast<Acc>(v);
      x_y[u] = select(is_its, x, x_y[u]);
      if (kWeight) w_y[u] = select(is_its, splat<V>(c.o.weight[v]), w_y[u]);
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < NV; ++u) {
    max[u] = of_rows(a.row_max, u);
    log_sum[u] = of_rows(a.row_log_sum, u);
    const V of_loss = a.grad_loss_stride ? of_rows(a.grad_loss, u)
                                         : splat<V>(*static_cast<const Acc*>(a.grad_loss));
    g[u] = select(of_loss == Acc(0), V{}, of_loss * norm) * w_y[u];
    of_class[u] = g[u] * expm1_nonpositive<Acc>((x_y[u] - max[u]) - log_sum[u]);
  }
  for (int64_t v = 0; v < in.V; ++v) {
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) {
      const V x = c.template raw<kWhole>(v, u);
      V d = exp_nonpositive<Acc>((x - max[u]) - log_sum[u]) * g[u];
      d = select(y[u] == static_cast<Acc>(v), of_class[u], d);
      // What a row without a gradient holds, NaN perhaps, must not matter.
      d = select(y[u] < Acc(0), V{}, d);
      T* to = dx + v * dx_stride + u * L;
      kWhole ? store(to, d) : store_part<Acc>(to, d, c.lanes(u));
    }
  }
}

bool is_few(const CrossEntropyInputs& in, int64_t most_copied) {
  return in.V <= (in.side ? kClasses : most_copied) && in.target && in.softcap == 0 &&
         in.label_smoothing == 0;
}

// Calls f(whole, weight, columns) with what the columns have.
template <class Columns, class F>
void with_kind(const Columns& columns, F&& f) {
  using False = std::false_type;
  using True = std::true_type;
  if (columns.o.weight) {
    columns.whole() ? f(True{}, True{}, columns) : f(False{}, True{}, columns);
  } else {
    columns.whole() ? f(True{}, False{}, columns) : f(False{}, False{}, columns);
  }
}

// Calls f(columns, block) for rows [begin, end) that are copied, with the block they are in.
template <class T, class F>
void for_copies(const CrossEntropyInputs& in, int64_t begin, int64_t end, F&& f) {
  using Acc = AccOf<T>;
  Block<Acc> block;
  for (int64_t n = begin; n < end; n += Block<Acc>::kRows) {
    const int64_t count = end - n < Block<Acc>::kRows ? end - n : Block<Acc>::kRows;
    block.template read<T>(in, n, count);
    const Columns<Acc, kMostVectors> columns(in, n, count, block.lanes, Block<Acc>::kRows);
    f(columns, block);
  }
}

}  // namespace

bool forward_of_few(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end) {
  if (!is_few(a.in, kCopied) || a.add_z_loss) return false;
  const auto run = [&](const auto& columns) {
    with_kind(columns, [&](auto whole, auto weight, const auto& c) {
      forward_few<whole.value, weight.value>(a, c);
    });
  };
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.in.side) {
      for_columns<T>(a.in, begin, end, run);
    } else {
      for_copies<T>(a.in, begin, end, [&](const auto& columns, auto&) { run(columns); });
    }
  });
  return true;
}

bool backward_of_few(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  const CrossEntropyInputs& in = a.in;
  if (!is_few(in, kCopiedBack) || in.z_loss != 0 || !a.grad_loss || a.grad_lse) return false;
  const auto run = [&](const auto& columns, auto* dx, int64_t dx_stride) {
    with_kind(columns, [&](auto whole, auto weight, const auto& c) {
      backward_few<whole.value, weight.value>(a, c, dx, dx_stride);
    });
  };
  dispatch_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (in.side) {
      for_columns<T>(in, begin, end, [&](const auto& columns) {
        const int64_t n = columns.n;
        T* dx = static_cast<T*>(a.dlogits) + (n / in.side * in.V * in.side + n % in.side);
        run(columns, dx, in.side);
      });
    } else {
      for_copies<T>(in, begin, end, [&](const auto& columns, auto& block) {
        run(columns, block.lanes, block.kRows);
        block.template write<T>(in, a.dlogits, columns.n, columns.count);
      });
    }
  });
  return true;
}

}  // namespace seqkern::cpu::SEQKERN_ISA
