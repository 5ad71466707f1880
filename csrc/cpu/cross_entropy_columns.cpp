// Softmax-cross-entropy on the CPU of rows that lie side by side, as those of [B, V, T] do. No row
// is copied.
#include "cpu/cross_entropy_columns.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// ---------------------------------------------------------------- forward

template <bool kWhole, bool kOptions, class T, int NV>
void forward_block(const CrossEntropyForwardArgs& a, const Columns<T, NV>& c) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const bool sums = kOptions && (c.p || c.uniform != 0);
  V max[NV], sum[NV] = {}, shift[NV] = {}, mass[NV] = {}, dot[NV] = {};
#pragma GCC unroll 4
  for (int u = 0; u < NV; ++u) max[u] = splat<V>(lowest<Acc>());
  for (int64_t v = 0; v < a.in.V; v += kClasses) {
    const int64_t end = a.in.V - v < kClasses ? a.in.V : v + kClasses;
    V m[NV];
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) m[u] = max[u];
    for (int64_t i = v; i < end; ++i) {
#pragma GCC unroll 4
      for (int u = 0; u < NV; ++u) m[u] = vmax(m[u], c.template logit<kWhole, kOptions>(i, u));
    }
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) {
      if (v > 0) {
        sum[u] = in_register(sum[u] * exp_nonpositive<Acc>(max[u] - m[u]));
      } else {
        shift[u] = m[u];
      }
      max[u] = m[u];
    }
    for (int64_t i = v; i < end; ++i) {
#pragma GCC unroll 4
      for (int u = 0; u < NV; ++u) {
        const V x = c.template logit<kWhole, kOptions>(i, u);
        sum[u] += exp_nonpositive<Acc>(x - max[u]);
        if (sums) {
          const V q = c.template target<kWhole>(i, u);
          mass[u] += q;
          dot[u] += q * (x - shift[u]);
        }
      }
    }
  }
  alignas(64) Acc x_y[NV * L];
  c.of_classes(x_y, nullptr);
  for (int64_t i = 0; i < c.count; ++i) {
    const int u = static_cast<int>(i / L), l = static_cast<int>(i % L);
    const Acc m = max[u][l], log_sum = log1(sum[u][l]);
    const Acc extra = sums ? mass[u][l] * (log_sum + (m - shift[u][l])) - dot[u][l] : Acc(0);
    finish_row(a, c.o, c.n + i, m, log_sum, x_y[i], extra);
  }
}

// ---------------------------------------------------------------- backward

template <bool kWhole, bool kOptions, class T, int NV>
void backward_block(const CrossEntropyBackwardArgs& a, const Columns<T, NV>& c) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  alignas(64) Acc mass[NV * L] = {};
  if (c.p) {
    V sum[NV] = {};
    for (int64_t v = 0; v < in.V; ++v) {
#pragma GCC unroll 4
      for (int u = 0; u < NV; ++u) sum[u] += c.template target<kWhole>(v, u);
    }
    for (int u = 0; u < NV; ++u) store(mass + u * L, sum[u]);
  }
  V max[NV], log_sum[NV];
  for (int u = 0; u < NV; ++u) {
    const int64_t n = c.n + u * L;
    max[u] = load_part<Acc>(static_cast<const Acc*>(a.row_max) + n, c.lanes(u));
    log_sum[u] = load_part<Acc>(static_cast<const Acc*>(a.row_log_sum) + n, c.lanes(u));
  }
  alignas(64) Acc scale[NV * L] = {}, of_targets[NV * L] = {}, wanted[NV * L] = {};
  RowGradient<Acc> rows[NV * L];
  for (int64_t i = 0; i < c.count; ++i) {
    rows[i] = RowGradient<Acc>(a, c.o, c.n + i);
    if (c.p) rows[i].set_mass(mass[i]);
    wanted[i] = rows[i].none ? Acc(0) : Acc(1);
    scale[i] = rows[i].scale();
    of_targets[i] = rows[i].g_ce;
  }

  T* dx = static_cast<T*>(a.dlogits) + (c.n / in.side * in.V * in.side + c.n % in.side);
  const bool sums = kOptions && (c.p || c.uniform != 0);
  for (int64_t v = 0; v < in.V; ++v) {
#pragma GCC unroll 4
    for (int u = 0; u < NV; ++u) {
      V x = c.template raw<kWhole>(v, u), derivative;
      const bool cap = kOptions && c.o.softcap > 0;
      if (cap) x = c.capped(x, &derivative);
      V d = in_register(exp_nonpositive<Acc>((x - max[u]) - log_sum[u]) * load(scale + u * L));
      if (sums) d -= c.template target<kWhole>(v, u) * load(of_targets + u * L);
      if (cap) d *= derivative;
      // What a row without a gradient holds, NaN perhaps, must not matter.
      d = select(load(wanted + u * L) != Acc(0), d, V{});
      T* to = dx + v * in.side + u * L;
      kWhole ? store(to, d) : store_part<Acc>(to, d, c.lanes(u));
    }
  }

  alignas(64) Acc x_y[NV * L], derivative[NV * L];
  c.of_classes(x_y, derivative);
  for (int u = 0; u < NV; ++u) {
    const V log_p = (load(x_y + u * L) - max[u]) - log_sum[u];
    const V p_less_1 = expm1_nonpositive<Acc>(log_p), p = exp_nonpositive<Acc>(log_p);
    for (int64_t l = 0; l < c.lanes(u); ++l) {
      const int64_t i = u * L + l;
      if (rows[i].on_target == 0) continue;
      const int64_t y = in.target[c.n + i];
      Acc d = rows[i].of_class(p_less_1[l], p[l]);
      if (sums) d -= rows[i].g_ce * c.uniform * c.o.weight_of(y);
      store1(dx + y * in.side + i, d * derivative[i]);
    }
  }
}

template <class Args, class F>
void run(const Args& a, int64_t begin, int64_t end, F&& f) {
  const bool options = a.in.softcap > 0 || a.in.label_smoothing != 0 || a.in.target_probs;
  using False = std::false_type;
  using True = std::true_type;
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    for_columns<typename decltype(tag)::type>(a.in, begin, end, [&](const auto& columns) {
      if (columns.whole()) {
        options ? f(True{}, True{}, columns) : f(True{}, False{}, columns);
      } else {
        options ? f(False{}, True{}, columns) : f(False{}, False{}, columns);
      }
    });
  });
}

}  // namespace

void forward_columns(const CrossEntropyForwardArgs& a, int64_t begin, int64_t end) {
  run(a, begin, end, [&](auto whole, auto options, const auto& columns) {
    forward_block<whole.value, options.value>(a, columns);
  });
}

void backward_columns(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  run(a, begin, end, [&](auto whole, auto options, const auto& columns) {
    backward_block<whole.value, options.value>(a, columns);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
