// The GRU and the RNN on the CPU, forward: products of a block of units and their pointwise part in
// one go.
#include "cpu/gru_rnn.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T, bool kGru>
struct Forward {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kAccBytes = sizeof(Acc);
  static constexpr int G = kGru ? 3 : 1;

  const HiddenForwardArgs& args;
  const RecurrentInputs& r;
  Arena arena;
  Teams teams;
  PackedMatrix<Acc> w;  // [H, H] per gate
  int64_t h_row;        // elements of a row of state
  Counter* counters;
  Acc* h;  // [2, B, h_row] in order, h before and after a step in turn

  Forward(const HiddenForwardArgs& args, int64_t members, char* base)
      : args(args),
        r(args.r),
        arena{base},
        teams(r, members, (r.H + L - 1) / L, G * r.H * r.H * kAccBytes, tile_parts<T>(r.B, r.H),
              arena),
        w(r.H, r.H, G, teams.most_rows(), teams.per_chain, tile_parts<T>(r.B, r.H)),
        h_row(w.left_row()) {
    counters = arena.take<Counter>(counter_count());
    w.data = arena.take<Acc>(w.size());
    h = arena.take<Acc>(2 * r.B * h_row);
  }

  Beginning beginning() const { return {w.blocks, 1, teams.members}; }
  int64_t begin_items() const { return beginning().items(); }
  int64_t counter_count() const { return 1 + begin_items() + teams.chains * (1 + w.blocks); }

  void prepare() const {
    __builtin_memset(counters, 0, counter_count() * sizeof(Counter));
    teams.sort(r);
  }

  void run(int64_t member) const {
    const Chain begin{1, {begin_items(), 0}, counters};
    run_chain(begin, member, teams.members, [&](int64_t, int, int64_t item) { pack(item); });
    teams.visit(member, [&](int64_t chain, int64_t own, int64_t members) {
      const ChainRows rows = teams.rows(chain);
      Running running{teams.steps + rows.begin, rows.end - rows.begin, rows.end - rows.begin};
      const Chain steps{teams.steps[rows.begin],
                        {w.blocks, 0},
                        counters + 1 + begin_items() + chain * (1 + w.blocks)};
      run_chain(steps, own, members, [&](int64_t s, int, int64_t block) {
        const int64_t n = running.when_growing(s);
        for (int64_t i = 0; i < n; i += kRowBlock) {
          step(s, block, rows.begin + i, n - i < kRowBlock ? n - i : kRowBlock);
        }
      });
    });
  }

  // Before the first step: weights packed, states in place, zeros where there is only padding.
  void pack(int64_t item) const {
    beginning().visit(
        item, [&](int64_t, int64_t block) { w.pack(block, static_cast<const T*>(r.w_hh), 1, r.H); },
        [&](int64_t member) { place(member); });
  }

  // A member's share of the rows.
  void place(int64_t member) const {
    const int64_t end = r.B * (member + 1) / teams.members;
    for (int64_t p = r.B * member / teams.members; p < end; ++p) {
      const int64_t b = teams.order[p];
      for (int64_t step = 0; step < 2; ++step) w.clear(h + (step * r.B + p) * h_row);
      if (r.h0) w.put_row(h + p * h_row, static_cast<const T*>(r.h0) + b * r.H);
      for (int64_t t = teams.steps[p]; t < r.T; ++t) {
        __builtin_memset(row(args.h, t * r.B + b), 0, r.H * sizeof(T));
      }
      if (teams.steps[p] > 0) continue;
      hand_through<T>(args.h_n, r.h0, b, r.H);
    }
  }

  // Row n of [.., H].
  T* row(void* rows, int64_t n) const { return static_cast<T*>(rows) + n * r.H; }

  void step(int64_t s, int64_t block, int64_t p0, int64_t rows) const {
    const int64_t first = w.first_unit(block), units = w.units_of(block), H = r.H;
    const int64_t panel = w.width_of(block) * L;
    const SequenceStrides gate_strides = {r.B * G * H, G * H}, unit_strides = {r.B * H, H};
    const T* x = static_cast<const T*>(args.gates_x);
    const T* b_ih = static_cast<const T*>(args.b_ih);
    const T* b_hh = static_cast<const T*>(r.b_hh);
    for (int64_t p = p0; p < p0 + rows; ++p) {
      const int64_t t = time_of(r, teams.steps[p], s), b = teams.order[p];
      prefetch_gates(x + token_offset(r, gate_strides, t, b) + first, G, H, units);
    }
    const Acc* h_before = h + (s & 1) * r.B * h_row + p0 * h_row;
    Acc* h_after = h + ((s + 1) & 1) * r.B * h_row + p0 * h_row;
    alignas(64) Acc a[kProductSize<Acc>];
    product(w, block, h_before, h_row, rows, a, G * panel);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = p0 + i, t = time_of(r, teams.steps[p], s), b = teams.order[p];
      const int64_t token = token_offset(r, gate_strides, t, b);
      T* y_t = args.gates ? static_cast<T*>(args.gates) + token : nullptr;
      T* u_t =
          args.gates ? static_cast<T*>(args.u_n) + token_offset(r, unit_strides, t, b) : nullptr;
      T* h_t = row(args.h, t * r.B + b);
      T* h_n = s + 1 == teams.steps[p] ? row(args.h_n, b) : nullptr;
      for (int64_t v = 0; v < units; v += L) {
        const int64_t u = first + v, count = units - v < L ? units - v : L;
        const auto with_bias = [&](V sum, const T* bias, int gate) __attribute__((always_inline)) {
          return bias ? V(sum + load_part<Acc>(bias + gate * H + u, count)) : sum;
        };
        const auto input = [&](int gate) __attribute__((always_inline)) {
          return with_bias(load_part<Acc>(x + token + gate * H + u, count), b_ih, gate);
        };
        const auto recurrent = [&](int gate) __attribute__((always_inline)) {
          return with_bias(load(a + (i * G + gate) * panel + v), b_hh, gate);
        };
        V next;
        if constexpr (kGru) {
          const GruGates<Acc> y = activate<Acc>(
              {input(0) + recurrent(0), input(1) + recurrent(1), input(2), recurrent(2)});
          if (y_t) {
            store_part<Acc>(y_t + u, y.r, count);
            store_part<Acc>(y_t + H + u, y.z, count);
            store_part<Acc>(y_t + 2 * H + u, y.n, count);
            store_part<Acc>(u_t + u, y.u_n, count);
          }
          next = next_h<Acc>(y, w.get(h_before + i * h_row, u));
        } else {
          next = rnn_activate<Acc>(args.cell == HiddenCell::kRelu, input(0) + recurrent(0));
        }
        store_part<Acc>(h_t + u, next, count);
        w.put(h_after + i * h_row, u, rounded<T, Acc>(next), count);
        if (h_n) store_part<Acc>(h_n + u, next, count);
      }
    }
  }
};

// f(the walk) for the element type and cell of `args`.
template <class F>
auto walk(const HiddenForwardArgs& args, int64_t members, void* base, F f) {
  return dispatch_dtype(args.r.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    char* bytes = static_cast<char*>(base);
    if (args.cell == HiddenCell::kGru) return f(Forward<T, true>(args, members, bytes));
    return f(Forward<T, false>(args, members, bytes));
  });
}

}  // namespace

int64_t hidden_forward_workspace(const HiddenForwardArgs& args, int64_t members) {
  return walk(args, members, nullptr, [](const auto& w) { return w.arena.used; });
}
void hidden_forward_prepare(const HiddenForwardArgs& args, int64_t members) {
  walk(args, members, args.workspace, [](const auto& w) { w.prepare(); });
}
void hidden_forward(const HiddenForwardArgs& args, int64_t members, int64_t member) {
  const ProductSession session;
  walk(args, members, args.workspace, [&](const auto& w) { w.run(member); });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
