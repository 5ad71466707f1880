// The GRU and the RNN on the CPU, backward: the gradient that comes from the step after, and the
// pointwise part of a block of units, in one go.
#include "cpu/gru_rnn.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Stage i is step s = S - 1 - i, S the steps of the chain's longest row; after step 0 one more
// makes dh0. A stage makes dh_s = du_{s+1} w_hh + what went past the cell + what comes from
// outside, and from it du_s.
template <class T, bool kGru>
struct Backward {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kAccBytes = sizeof(Acc);
  static constexpr int G = kGru ? 3 : 1;

  const HiddenBackwardArgs& args;
  const RecurrentInputs& r;
  Arena arena;
  Teams teams;
  PackedMatrix<Acc> w;  // [G H, H]
  int64_t d_row, h_row;
  Counter* counters;
  Acc* d;     // [2, B, d_row] in order: du of the step after and of this one, in turn
  Acc* past;  // GRU: [B, h_row], z dh of the step after

  Backward(const HiddenBackwardArgs& args, int64_t members, char* base)
      : args(args),
        r(args.r),
        arena{base},
        teams(r, members, (r.H + L - 1) / L, G * r.H * r.H * kAccBytes, tile_parts<T>(r.B, G * r.H),
              arena),
        w(G * r.H, r.H, 1, teams.most_rows(), teams.per_chain, tile_parts<T>(r.B, G * r.H)),
        d_row(w.left_row()),
        h_row(padded<Acc>(r.H)) {
    w.template read_in_place<T>(r.w_hh, teams.most_rows());
    counters = arena.take<Counter>(counter_count());
    w.data = arena.take<Acc>(w.size());
    d = arena.take<Acc>(2 * r.B * d_row);
    past = kGru ? arena.take<Acc>(r.B * h_row) : nullptr;
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
      const int64_t longest = teams.steps[rows.begin];
      Running running{teams.steps + rows.begin, rows.end - rows.begin, 0};
      Running carried = running;
      const Chain steps{
          longest + 1, {w.blocks, 0}, counters + 1 + begin_items() + chain * (1 + w.blocks)};
      run_chain(steps, own, members, [&](int64_t i, int, int64_t block) {
        const int64_t s = longest - 1 - i;
        if (s < 0 && !args.dh0) return;
        const int64_t n = running.when_falling(s < 0 ? 0 : s);
        const int64_t n_after = carried.when_falling(s + 1);
        for (int64_t k = 0; k < n; k += kRowBlock) {
          const int64_t count = n - k < kRowBlock ? n - k : kRowBlock;
          const int64_t after = n_after < k ? 0 : n_after - k < count ? n_after - k : count;
          step(s, block, rows.begin + k, count, after);
        }
      });
    });
  }

  Acc* d_of(int64_t s) const { return d + (s & 1) * r.B * d_row; }
  SEQKERN_INLINE T* at(void* rows, int64_t n, int64_t width) {
    return static_cast<T*>(rows) + n * width;
  }
  SEQKERN_INLINE const T* at(const void* rows, int64_t n, int64_t width) {
    return static_cast<const T*>(rows) + n * width;
  }
  SequenceStrides gate_strides() const { return {r.B * G * r.H, G * r.H}; }
  SequenceStrides unit_strides() const { return {r.B * r.H, r.H}; }

  // Before the last step: weights packed, zeros where there is only padding.
  void pack(int64_t item) const {
    beginning().visit(
        item, [&](int64_t, int64_t block) { w.pack(block, static_cast<const T*>(r.w_hh), r.H, 1); },
        [&](int64_t member) { place(member); });
  }

  // A member's share of the rows.
  void place(int64_t member) const {
    const int64_t H = r.H;
    const int64_t end = r.B * (member + 1) / teams.members;
    for (int64_t p = r.B * member / teams.members; p < end; ++p) {
      const int64_t b = teams.order[p];
      for (int64_t step = 0; step < 2; ++step) w.clear(d_of(step) + p * d_row);
      for (int64_t t = teams.steps[p]; t < r.T && !r.first_token; ++t) {
        const int64_t n = t * r.B + b;
        __builtin_memset(at(args.dgates, n, G * H), 0, G * H * sizeof(T));
        if (kGru) __builtin_memset(at(args.du_n, n, H), 0, H * sizeof(T));
      }
      if (teams.steps[p] > 0) continue;
      if (args.du_0) __builtin_memset(at(args.du_0, b, G * H), 0, G * H * sizeof(T));
      if (args.dh0) hand_through<T>(args.dh0, args.dh_n, b, H);
    }
  }

  void prefetch(int64_t s, int64_t p0, int64_t rows, int64_t first, int64_t units) const {
    for (int64_t p = p0; p < p0 + rows; ++p) {
      const int64_t t = time_of(r, teams.steps[p], s), b = teams.order[p];
      if constexpr (kGru) {
        prefetch_gates(at(args.gates, 0, 0) + token_offset(r, gate_strides(), t, b) + first, 3, r.H,
                       units);
        prefetch_gates(at(args.u_n, 0, 0) + token_offset(r, unit_strides(), t, b) + first, 1, r.H,
                       units);
      } else {
        prefetch_gates(at(args.h, t * r.B + b, r.H) + first, 1, r.H, units);
      }
    }
  }

  // `after` of the rows, the first ones, have a step after this one.
  void step(int64_t s, int64_t block, int64_t p0, int64_t rows, int64_t after) const {
    const int64_t first = w.first_unit(block), units = w.units_of(block), H = r.H;
    const int64_t panel = w.width_of(block) * L;
    if (s >= 0) prefetch(s, p0, rows, first, units);
    alignas(64) Acc sum[kProductSize<Acc>];
    if (after > 0) product(w, block, d_of(s + 1) + p0 * d_row, d_row, after, sum, panel);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = p0 + i, steps = teams.steps[p], b = teams.order[p];
      const int64_t t = time_of(r, steps, s);
      const T* dh_t =
          args.dh ? static_cast<const T*>(args.dh) + t * args.dh_strides.t + b * args.dh_strides.b
                  : nullptr;
      for (int64_t v = 0; v < units; v += L) {
        const int64_t u = first + v, count = units - v < L ? units - v : L;
        V dh = {};
        if (i < after) {
          dh = load(sum + i * panel + v);
          if constexpr (kGru) dh += load(past + p * h_row + u);
        }
        if (s < 0) {
          store_part<Acc>(at(args.dh0, b, H) + u, dh, count);
          continue;
        }
        if (args.dh_n && s + 1 == steps) dh += load_part<Acc>(at(args.dh_n, b, H) + u, count);
        if (dh_t) dh += load_part<Acc>(dh_t + u, count);
        cell(s, p, t, b, u, count, dh);
      }
    }
  }

  // The units u .. of row p at step s, from the gradient at their h.
  __attribute__((always_inline)) void cell(int64_t s, int64_t p, int64_t t, int64_t b, int64_t u,
                                           int64_t count, V dh) const {
    const int64_t H = r.H;
    T* d_t = static_cast<T*>(args.dgates) + token_offset(r, gate_strides(), t, b) + u;
    T* d_0 = s == 0 && args.du_0 ? at(args.du_0, b, G * H) + u : nullptr;
    Acc* kept = d_of(s) + p * d_row;
    const auto keep = [&](int gate, V du) __attribute__((always_inline)) {
      w.put(kept, gate * H + u, rounded<T, Acc>(du), count);
      if (d_0) store_part<Acc>(d_0 + gate * H, du, count);
    };
    if constexpr (kGru) {
      const int64_t token = token_offset(r, unit_strides(), t, b);
      const T* y_t = at(args.gates, 0, 0) + token_offset(r, gate_strides(), t, b) + u;
      GruGates<Acc> y = {load_part<Acc>(y_t, count), load_part<Acc>(y_t + H, count),
                         load_part<Acc>(y_t + 2 * H, count),
                         load_part<Acc>(at(args.u_n, 0, 0) + token + u, count)};
      if (!args.activated) y = activate<Acc>(y);
      const T* before = s > 0  ? at(args.h, time_of(r, teams.steps[p], s - 1) * r.B + b, H)
                        : r.h0 ? at(r.h0, b, H)
                               : nullptr;
      const V h_before = before ? load_part<Acc>(before + u, count) : V{};
      const GruGates<Acc> g = gate_gradients<Acc>(y, h_before, dh);
      store(past + p * h_row + u, dh);
      store_part<Acc>(d_t, g.r, count);
      store_part<Acc>(d_t + H, g.z, count);
      store_part<Acc>(d_t + 2 * H, g.n, count);
      store_part<Acc>(static_cast<T*>(args.du_n) + token + u, g.u_n, count);
      keep(0, g.r);
      keep(1, g.z);
      keep(2, g.u_n);
    } else {
      const V h_t = load_part<Acc>(at(args.h, t * r.B + b, H) + u, count);
      const V da = rnn_gradient<Acc>(args.cell == HiddenCell::kRelu, h_t, dh);
      store_part<Acc>(d_t, da, count);
      keep(0, da);
    }
  }
};

// f(the walk) for the element type and cell of `args`.
template <class F>
auto walk(const HiddenBackwardArgs& args, int64_t members, void* base, F f) {
  return dispatch_dtype(args.r.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    char* bytes = static_cast<char*>(base);
    if (args.cell == HiddenCell::kGru) return f(Backward<T, true>(args, members, bytes));
    return f(Backward<T, false>(args, members, bytes));
  });
}

}  // namespace

int64_t hidden_backward_workspace(const HiddenBackwardArgs& args, int64_t members) {
  return walk(args, members, nullptr, [](const auto& w) { return w.arena.used; });
}
void hidden_backward_prepare(const HiddenBackwardArgs& args, int64_t members) {
  walk(args, members, args.workspace, [](const auto& w) { w.prepare(); });
}
void hidden_backward(const HiddenBackwardArgs& args, int64_t members, int64_t member) {
  const ProductSession session;
  walk(args, members, args.workspace, [&](const auto& w) { w.run(member); });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
