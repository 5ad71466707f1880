// The LSTM on the CPU, backward: the gradient that comes from the step after, and the pointwise
// part of a block of units, in one go.
#include "cpu/kernels.h"
#include "cpu/lstm.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Stage i is step s = S - 1 - i, S the steps of the chain's longest row; after step 0 one more
// makes dh0. Phase 0 makes dh_s = dgates_{s+1} w_hh + what comes from outside, and from it
// dgates_s; with a projection that second half is phase 1.
template <class T>
struct Backward {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kAccBytes = sizeof(Acc);

  const LstmBackwardArgs& args;
  const RecurrentInputs& r;
  Arena arena;
  Teams teams;
  PackedMatrix<Acc> w;     // [4 H, P]
  PackedMatrix<Acc> w_hr;  // [P, H]; nothing without a projection
  int64_t d_row, h_row, c_row;
  Counter* counters;
  int64_t counters_of_chain;
  Acc* d;   // [2, B, d_row] in order: dgates of the step after and of this one, in turn
  Acc* dh;  // [B, h_row] with a projection
  Acc* dc;  // [B, c_row]

  Backward(const LstmBackwardArgs& args, int64_t members, char* base)
      : args(args),
        r(args.in.r),
        arena{base},
        teams(r, members, (r.H + L - 1) / L, 4 * r.H * r.P * kAccBytes, tile_parts<T>(r.B, 4 * r.H),
              arena),
        w(4 * r.H, r.P, 1, teams.most_rows(), teams.per_chain, tile_parts<T>(r.B, 4 * r.H)),
        w_hr(r.P, r.H, 1, teams.most_rows(), teams.per_chain, tile_parts<T>(r.B, r.P)),
        d_row(w.left_row()),
        h_row(w_hr.left_row()),
        c_row(padded<Acc>(r.H)) {
    if (!args.in.w_hr) w_hr.blocks = 0;
    w.template read_in_place<T>(r.w_hh, teams.most_rows());
    counters_of_chain = 1 + w.blocks + w_hr.blocks;
    counters = arena.take<Counter>(counter_count());
    w.data = arena.take<Acc>(w.size());
    d = arena.take<Acc>(2 * r.B * d_row);
    dc = arena.take<Acc>(r.B * c_row);
    dh = args.in.w_hr ? arena.take<Acc>(r.B * h_row) : nullptr;
    if (args.in.w_hr) w_hr.data = arena.take<Acc>(w_hr.size());
  }

  Beginning beginning() const { return {w.blocks, 1, teams.members}; }
  int64_t begin_items() const { return beginning().items() + w_hr.blocks; }
  int64_t counter_count() const { return 1 + begin_items() + teams.chains * counters_of_chain; }

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
      const Chain steps{longest + 1,
                        {w.blocks, w_hr.blocks},
                        counters + 1 + begin_items() + chain * counters_of_chain};
      run_chain(steps, own, members, [&](int64_t i, int phase, int64_t block) {
        const int64_t s = longest - 1 - i;
        const int64_t n = running.when_falling(s < 0 ? 0 : s);
        const int64_t n_after = carried.when_falling(s + 1);
        for (int64_t k = 0; k < n; k += kRowBlock) {
          const int64_t count = n - k < kRowBlock ? n - k : kRowBlock;
          const int64_t after = n_after < k ? 0 : n_after - k < count ? n_after - k : count;
          if (phase == 0) {
            gradient_of_h(s, block, rows.begin + k, count, after);
          } else if (s >= 0) {
            unproject(s, block, rows.begin + k, count);
          }
        }
      });
    });
  }

  Acc* d_of(int64_t s) const { return d + (s & 1) * r.B * d_row; }

  // Before the last step.
  void pack(int64_t item) const {
    const Beginning all = beginning();
    if (item >= all.items()) {
      return w_hr.pack(item - all.items(), static_cast<const T*>(args.in.w_hr), r.H, 1);
    }
    all.visit(
        item, [&](int64_t, int64_t block) { w.pack(block, static_cast<const T*>(r.w_hh), r.P, 1); },
        [&](int64_t member) { place(member); });
  }

  // A member's share of the rows: the gradients of their last states, and zeros where there is only
  // padding.
  void place(int64_t member) const {
    const int64_t end = r.B * (member + 1) / teams.members;
    for (int64_t p = r.B * member / teams.members; p < end; ++p) {
      const int64_t b = teams.order[p], H = r.H;
      copy_row<T>(dc + p * c_row, args.dc_n, b, H);
      for (int64_t step = 0; step < 2; ++step) w.clear(d_of(step) + p * d_row);
      if (dh) w_hr.clear(dh + p * h_row);
      for (int64_t t = teams.steps[p]; t < r.T; ++t) {
        const int64_t n = t * r.B + b;
        if (!r.first_token)
          __builtin_memset(at(args.dgates, n, args.dgates_row), 0, 4 * H * sizeof(T));
        if (args.dh_total) __builtin_memset(at(args.dh_total, n, r.P), 0, r.P * sizeof(T));
        if (args.m) __builtin_memset(at(args.m, n, H), 0, H * sizeof(T));
      }
      if (teams.steps[p] > 0) continue;
      if (args.dgates_0) __builtin_memset(at(args.dgates_0, b, 4 * H), 0, 4 * H * sizeof(T));
      if (args.dh0) hand_through<T>(args.dh0, args.dh_n, b, r.P);
      if (args.dc0) hand_through<T>(args.dc0, args.dc_n, b, H);
    }
  }

  SEQKERN_INLINE T* at(void* rows, int64_t n, int64_t width) {
    return static_cast<T*>(rows) + n * width;
  }
  SEQKERN_INLINE const T* at(const void* rows, int64_t n, int64_t width) {
    return static_cast<const T*>(rows) + n * width;
  }

  void gradient_of_h(int64_t s, int64_t block, int64_t p0, int64_t rows, int64_t after) const {
    const int64_t first = w.first_unit(block), units = w.units_of(block);
    const int64_t panel = w.width_of(block) * L;
    if (s < 0 && !args.dh0) return;
    alignas(64) Acc sum[kProductSize<Acc>];
    if (after > 0) product(w, block, d_of(s + 1) + p0 * d_row, d_row, after, sum, panel);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = p0 + i, steps = teams.steps[p], b = teams.order[p];
      const int64_t t = time_of(r, steps, s);
      const T* dh_t =
          args.dh ? static_cast<const T*>(args.dh) + t * args.dh_strides.t + b * args.dh_strides.b
                  : nullptr;
      const Cell row = s < 0 || dh ? Cell{} : cell_of(s, p, t);
      for (int64_t v = 0; v < units; v += L) {
        const int64_t u = first + v, count = units - v < L ? units - v : L;
        V g = i < after ? load(sum + i * panel + v) : V{};
        if (s < 0) {
          store_part<Acc>(at(args.dh0, b, r.P) + u, g, count);
          continue;
        }
        if (args.dh_n && s + 1 == steps) g += load_part<Acc>(at(args.dh_n, b, r.P) + u, count);
        if (dh_t) g += load_part<Acc>(dh_t + u, count);
        if (dh) {
          store_part<Acc>(at(args.dh_total, t * r.B + b, r.P) + u, g, count);
          w_hr.put(dh + p * h_row, u, rounded<T, Acc>(g), count);
        } else {
          cell(row, u, count, g);
        }
      }
    }
  }

  void unproject(int64_t s, int64_t block, int64_t p0, int64_t rows) const {
    const int64_t first = w_hr.first_unit(block), units = w_hr.units_of(block);
    const int64_t panel = w_hr.width_of(block) * L;
    alignas(64) Acc dm[kProductSize<Acc>];
    product(w_hr, block, dh + p0 * h_row, h_row, rows, dm, panel);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t p = p0 + i;
      const Cell row = cell_of(s, p, time_of(r, teams.steps[p], s));
      for (int64_t v = 0; v < units; v += L) {
        cell(row, first + v, units - v < L ? units - v : L, load(dm + i * panel + v));
      }
    }
  }

  // Where a row's cell finds and leaves its parts at one step; null for what does not exist.
  struct Cell {
    const T* gates;
    const T* c;
    const T* c_before;
    const T* dc_given;
    Acc* dc;
    T* dgates;
    Acc* kept;  // dgates for the product of the step before
    T* dgates_0;
    T* dc0;
    T* m;
    // What step s - 1 will read and this one does not. Asked for a vector at a time: all at once
    // would be more than a core can wait for.
    const T* next_gates;
    const T* next_c;
    const T* next_dh;
  };

  Cell cell_of(int64_t s, int64_t p, int64_t t) const {
    const int64_t H = r.H, b = teams.order[p], steps = teams.steps[p], n = t * r.B + b;
    const auto time = [&](int64_t step) { return time_of(r, steps, step); };
    const auto token = [&](int64_t at_t, int64_t row) {
      return token_offset(r, {r.B * row, row}, at_t, b);
    };
    const T* gates = at(args.gates, 0, 0);
    const T* given = static_cast<const T*>(args.dh);
    return {.gates = gates + token(t, 4 * H),
            .c = at(args.c, n, H),
            .c_before = s > 0        ? at(args.c, time(s - 1) * r.B + b, H)
                        : args.in.c0 ? at(args.in.c0, b, H)
                                     : nullptr,
            .dc_given = args.dc ? at(args.dc, n, H) : nullptr,
            .dc = dc + p * c_row,
            .dgates = static_cast<T*>(args.dgates) + token(t, args.dgates_row),
            .kept = d_of(s) + p * d_row,
            .dgates_0 = s == 0 && args.dgates_0 ? at(args.dgates_0, b, 4 * H) : nullptr,
            .dc0 = s == 0 && args.dc0 ? at(args.dc0, b, H) : nullptr,
            .m = args.m ? at(args.m, n, H) : nullptr,
            .next_gates = s > 0 ? gates + token(time(s - 1), 4 * H) : nullptr,
            .next_c = s > 1 ? at(args.c, time(s - 2) * r.B + b, H) : nullptr,
            .next_dh = s > 0 && given && !dh
                           ? given + time(s - 1) * args.dh_strides.t + b * args.dh_strides.b
                           : nullptr};
  }

  // The units u .., from the gradient at their m = o tanh(c).
  __attribute__((always_inline)) void cell(const Cell& row, int64_t u, int64_t count, V dm) const {
    const int64_t H = r.H;
    const auto part = [&](const T* from) __attribute__((always_inline)) {
      return load_part<Acc>(from + u, count);
    };
    Gates<Acc> y = {part(row.gates), part(row.gates + H), part(row.gates + 2 * H),
                    part(row.gates + 3 * H)};
    if (!args.activated) y = activate(y);
    if (row.next_gates) {
      for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(row.next_gates + gate * H + u);
    }
    if (row.next_c) __builtin_prefetch(row.next_c + u);
    if (row.next_dh) __builtin_prefetch(row.next_dh + u);
    const V tanh_c = vtanh(part(row.c));
    V dc_t = load(row.dc + u);
    if (row.dc_given) dc_t += part(row.dc_given);
    const Gates<Acc> g =
        gate_gradients<Acc>(y, row.c_before ? part(row.c_before) : V{}, tanh_c, dm, dc_t);
    store(row.dc + u, dc_t);
    if (row.m) store_part<Acc>(row.m + u, V(y.o * tanh_c), count);
    if (row.dc0) store_part<Acc>(row.dc0 + u, dc_t, count);
    const V all[] = {g.i, g.f, g.g, g.o};
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
      store_part<Acc>(row.dgates + gate * H + u, all[gate], count);
      w.put(row.kept, gate * H + u, rounded<T, Acc>(all[gate]), count);
      if (row.dgates_0) store_part<Acc>(row.dgates_0 + gate * H + u, all[gate], count);
    }
  }
};

}  // namespace

int64_t lstm_backward_workspace(const LstmBackwardArgs& args, int64_t members) {
  return dispatch_dtype(args.in.r.dtype, [&](auto tag) {
    return Backward<typename decltype(tag)::type>(args, members, nullptr).arena.used;
  });
}
void lstm_backward_prepare(const LstmBackwardArgs& args, int64_t members) {
  dispatch_dtype(args.in.r.dtype, [&](auto tag) {
    Backward<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .prepare();
  });
}
void lstm_backward(const LstmBackwardArgs& args, int64_t members, int64_t member) {
  dispatch_dtype(args.in.r.dtype, [&](auto tag) {
    const ProductSession session;
    Backward<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .run(member);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
