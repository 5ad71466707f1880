// The LSTM on the CPU, forward: products of a block of units and their pointwise part in one go.
#include "cpu/input_product.h"
#include "cpu/kernels.h"
#include "cpu/lstm.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Phase 0 of a step makes m from h before, for a block of units; phase 1, only with a projection,
// makes h from m.
template <class T>
struct Forward {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kAccBytes = sizeof(Acc);

  const LstmForwardArgs& args;
  const RecurrentInputs& r;
  Arena arena;
  Teams teams;
  PackedMatrix<Acc> w;  // [P, H] per gate
  InputProduct<T> input;
  PackedMatrix<Acc> w_hr;       // [H, P]; nothing without a projection
  int64_t h_row, c_row, m_row;  // elements of a row of state
  Counter* counters;
  int64_t counters_of_chain;
  Acc* h;  // [2, B, h_row] in order, h before and after a step in turn
  Acc* c;  // [B, c_row]
  Acc* m;  // [B, m_row] with a projection

  Forward(const LstmForwardArgs& args, int64_t members, char* base)
      : args(args),
        r(args.in.r),
        arena{base},
        teams(r, members, (r.H + L - 1) / L, 4 * r.H * r.P * kAccBytes, tile_parts<T>(r.B, r.P),
              arena),
        w(r.P, r.H, 4, teams.most_rows(), teams.per_chain, tile_parts<T>(r.B, r.P)),
        input(r, teams, args.x, args.w_ih, args.I, w),
        w_hr(r.H, r.P, 1, teams.most_rows(), teams.per_chain, tile_parts<T>(r.B, r.H)),
        h_row(w.left_row()),
        c_row(padded<Acc>(r.H)),
        m_row(w_hr.left_row()) {
    if (!args.in.w_hr) w_hr.blocks = 0;
    counters_of_chain = 1 + w.blocks + w_hr.blocks;
    counters = arena.take<Counter>(counter_count());
    w.data = arena.take<Acc>(w.size());
    if (!args.ids) input.take(arena);
    h = arena.take<Acc>(2 * r.B * h_row);
    c = arena.take<Acc>(r.B * c_row);
    m = args.in.w_hr ? arena.take<Acc>(r.B * m_row) : nullptr;
    if (args.in.w_hr) w_hr.data = arena.take<Acc>(w_hr.size());
  }

  // A lone chain packs in its first step, while the products of the input are made.
  bool packs_first() const { return teams.chains > 1; }
  Beginning beginning() const {
    return {w.blocks, !packs_first() ? 0 : args.ids ? 1 : 2, teams.members};
  }
  int64_t begin_items() const { return beginning().items() + w_hr.blocks; }
  int64_t counter_count() const { return 1 + begin_items() + teams.chains * counters_of_chain; }

  void prepare() const {
    __builtin_memset(counters, 0, counter_count() * sizeof(Counter));
    teams.sort(r);
  }

  void run(int64_t member) const {
    const Chain begin{1, {begin_items(), 0}, counters};
    run_chain(begin, member, teams.members, [&](int64_t, int, int64_t item) { pack(item); });
    // A step of few rows is so short that to claim its blocks one by one would show.
    const bool few = w.together && teams.per_chain < w.blocks;
    const int64_t items = few ? teams.per_chain : w.blocks;
    teams.visit(member, [&](int64_t chain, int64_t own, int64_t members) {
      const ChainRows rows = teams.rows(chain);
      Running running{teams.steps + rows.begin, rows.end - rows.begin, rows.end - rows.begin};
      typename InputProduct<T>::Steps ahead = input.steps_of(member);
      const Chain steps{teams.steps[rows.begin],
                        {items, w_hr.blocks},
                        counters + 1 + begin_items() + chain * counters_of_chain};
      run_chain(steps, own, members, [&](int64_t s, int phase, int64_t item) {
        const int64_t n = running.when_growing(s);
        const auto each_rows = [&](auto f) {
          for (int64_t i = 0; i < n; i += kRowBlock) f(i, n - i < kRowBlock ? n - i : kRowBlock);
        };
        if (phase == 1) {
          return each_rows(
              [&](int64_t i, int64_t count) { project(s, item, rows.begin + i, count); });
        }
        for (int64_t block = w.blocks * item / items; block < w.blocks * (item + 1) / items;
             ++block) {
          const auto fetch = [&](int gate) {
            w.fetch(block, gate, static_cast<const T*>(r.w_hh), r.P);
          };
          const Acc* x = args.ids ? nullptr : input.at(ahead, s, block, rows, fetch);
          if (s == 0 && !packs_first()) pack_recurrent(block);
          each_rows([&](int64_t i, int64_t count) {
            gates(s, block, rows.begin + i, count, x ? x + i * input.row_of(block) : nullptr);
          });
        }
      });
    });
  }

  const Acc* h_before(int64_t s) const { return h + (s & 1) * r.B * h_row; }
  Acc* h_after(int64_t s) const { return h + ((s + 1) & 1) * r.B * h_row; }

  // Before the first step.
  void pack(int64_t item) const {
    const Beginning all = beginning();
    if (item >= all.items()) {
      return w_hr.pack(item - all.items(), static_cast<const T*>(args.in.w_hr), 1, r.H);
    }
    all.visit(
        item,
        [&](int64_t matrix, int64_t block) {
          if (matrix == 1) return input.pack(block);
          pack_recurrent(block);
        },
        [&](int64_t member) { place(member); });
  }

  void pack_recurrent(int64_t block) const { w.pack(block, static_cast<const T*>(r.w_hh), 1, r.P); }

  // A member's share of the rows: their states, and zeros where there is only padding.
  void place(int64_t member) const {
    const int64_t end = r.B * (member + 1) / teams.members;
    for (int64_t p = r.B * member / teams.members; p < end; ++p) {
      const int64_t b = teams.order[p];
      for (int64_t step = 0; step < 2; ++step) w.clear(h_after(step) + p * h_row);
      if (m) w_hr.clear(m + p * m_row);
      if (r.h0) w.put_row(h + p * h_row, static_cast<const T*>(r.h0) + b * r.P);
      copy_row<T>(c + p * c_row, args.in.c0, b, r.H);
      for (int64_t t = teams.steps[p]; t < r.T; ++t) {
        __builtin_memset(output(t, b), 0, r.P * sizeof(T));
        if (args.c) __builtin_memset(cells(t, b), 0, r.H * sizeof(T));
      }
      if (teams.steps[p] > 0) continue;
      hand_through<T>(args.h_n, r.h0, b, r.P);
      hand_through<T>(args.c_n, args.in.c0, b, r.H);
    }
  }

  T* output(int64_t t, int64_t b) const {
    return static_cast<T*>(args.h) + t * args.h_strides.t + b * args.h_strides.b;
  }
  T* cells(int64_t t, int64_t b) const { return static_cast<T*>(args.c) + (t * r.B + b) * r.H; }
  SEQKERN_INLINE T* last(void* state, int64_t b, int64_t n) {
    return static_cast<T*>(state) + b * n;
  }

  // Row of the table that holds W_ih x_t.
  const T* looked_up(int64_t t, int64_t b) const {
    return static_cast<const T*>(args.table) + args.ids[t * r.B + b] * 4 * r.H;
  }

  // x: W_ih x_t of these rows; null: they are looked up.
  void gates(int64_t s, int64_t block, int64_t p0, int64_t rows, const Acc* x) const {
    alignas(64) Acc a[kProductSize<Acc>];
    product(w, block, h_before(s) + p0 * h_row, h_row, rows, a, 4 * w.width_of(block) * L);
    if (w.units_of(block) % L == 0) {
      cells_of<true>(s, block, p0, rows, x, a);
    } else {
      cells_of<false>(s, block, p0, rows, x, a);
    }
  }

  // a: w_hh h of the four gates. kWhole: all vectors of the block are whole, which takes most
  // branches out of the loop.
  template <bool kWhole>
  __attribute__((noinline)) void cells_of(int64_t s, int64_t block, int64_t p0, int64_t rows,
                                          const Acc* x, const Acc* a) const {
    const int64_t first = w.first_unit(block), units = w.units_of(block), H = r.H;
    const int64_t panel = w.width_of(block) * L;
    const SequenceStrides saved = {r.B * 4 * H, 4 * H};
    const T* bias = static_cast<const T*>(r.b_hh);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = p0 + i, t = time_of(r, teams.steps[p], s), b = teams.order[p];
      const bool is_last = s + 1 == teams.steps[p];
      T* y_t = args.gates ? static_cast<T*>(args.gates) + token_offset(r, saved, t, b) : nullptr;
      const T* found = x ? nullptr : looked_up(t, b);
      for (int64_t v = 0; v < units; v += L) {
        const int64_t u = first + v, count = kWhole || units - v >= L ? L : units - v;
        const Acc* a_v = a + i * 4 * panel + v;
        const auto input = [&](int64_t gate) __attribute__((always_inline)) {
          const V sum =
              load(a_v + gate * panel) + (found ? load_part<Acc>(found + gate * H + u, count)
                                                : load(x + i * 4 * panel + v + gate * panel));
          return bias ? V(sum + load_part<Acc>(bias + gate * H + u, count)) : sum;
        };
        const Gates<Acc> y = activate<Acc>({input(0), input(1), input(2), input(3)});
        if (y_t) {
          store_part<Acc>(y_t + u, y.i, count);
          store_part<Acc>(y_t + H + u, y.f, count);
          store_part<Acc>(y_t + 2 * H + u, y.g, count);
          store_part<Acc>(y_t + 3 * H + u, y.o, count);
        }
        Acc* c_p = c + p * c_row + u;
        const auto [c_t, m_t] = next_state<Acc>(y, load(c_p));
        store(c_p, c_t);
        if (args.c) store_part<Acc>(cells(t, b) + u, c_t, count);
        if (is_last) store_part<Acc>(last(args.c_n, b, H) + u, c_t, count);
        if (m) {
          w_hr.put(m + p * m_row, u, m_t, count);
        } else {
          store_h(s, p, t, b, u, count, m_t, is_last);
        }
      }
    }
  }

  void project(int64_t s, int64_t block, int64_t p0, int64_t rows) const {
    const int64_t first = w_hr.first_unit(block), units = w_hr.units_of(block);
    const int64_t panel = w_hr.width_of(block) * L;
    alignas(64) Acc a[kProductSize<Acc>];
    product(w_hr, block, m + p0 * m_row, m_row, rows, a, panel);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = p0 + i;
      for (int64_t v = 0; v < units; v += L) {
        const int64_t count = units - v < L ? units - v : L;
        store_h(s, p, time_of(r, teams.steps[p], s), teams.order[p], first + v, count,
                load(a + i * panel + v), s + 1 == teams.steps[p]);
      }
    }
  }

  __attribute__((always_inline)) void store_h(int64_t s, int64_t p, int64_t t, int64_t b, int64_t u,
                                              int64_t count, V h_t, bool is_last) const {
    store_part<Acc>(output(t, b) + u, h_t, count);
    w.put(h_after(s) + p * h_row, u, rounded<T, Acc>(h_t), count);
    if (is_last) store_part<Acc>(last(args.h_n, b, r.P) + u, h_t, count);
  }
};

}  // namespace

int64_t lstm_forward_workspace(const LstmForwardArgs& args, int64_t members) {
  return dispatch_dtype(args.in.r.dtype, [&](auto tag) {
    return Forward<typename decltype(tag)::type>(args, members, nullptr).arena.used;
  });
}
void lstm_forward_prepare(const LstmForwardArgs& args, int64_t members) {
  dispatch_dtype(args.in.r.dtype, [&](auto tag) {
    Forward<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .prepare();
  });
}
void lstm_forward(const LstmForwardArgs& args, int64_t members, int64_t member) {
  dispatch_dtype(args.in.r.dtype, [&](auto tag) {
    const ProductSession session;
    Forward<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .run(member);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
