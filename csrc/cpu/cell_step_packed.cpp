// One step of a cell with its products, forward, for rows enough that packed weights are worth
// making: a thread packs a panel and multiplies all rows with it while it is in cache, or finds it
// packed in a copy that the caller keeps.
#include "cpu/cell_step_units.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Both weights, in blocks of the same units whatever the number of rows.
template <class T>
struct StepWeights {
  using Acc = AccOf<T>;
  // Columns of a panel that the vector units read: with those of x and the sums that belong to them
  // they have room in first-level cache.
  static constexpr int64_t kColumns = 128;

  PackedMatrix<Acc> w[2];  // [I, H] and [H, H] per gate

  StepWeights(int G, int64_t I, int64_t H, int64_t members)
      : StepWeights(G, I, H, members, parts_of(I)) {}
  StepWeights(int G, int64_t I, int64_t H, int64_t members, int parts)
      : w{{I, H, G, panel_rows(parts, H), members, parts},
          {H, H, G, panel_rows(parts, H), members, parts_of(H)}} {
    w[0].blocks = w[1].blocks, w[0].width = w[1].width;
  }
  static int parts_of(int64_t K) { return tile_parts<T>(kRowBlock, K); }
  // With 32 registers there are sums for the four gates of a vector of units and six rows. Panels
  // of all gates are those of a matrix for few rows.
  static int64_t panel_rows(int parts, int64_t H) {
    return kManyRegisters && !parts && !parts_of(H) ? 4 : kRowBlock;
  }
  // Of matrix i. The matrix unit's tiles are smaller, and it adds up what it has in registers.
  int64_t columns(int i) const { return w[i].parts || w[i].K < kColumns ? w[i].K : kColumns; }
  // Columns [k, k + count) of matrix i.
  PackedMatrix<Acc> part(int i, int64_t k, int64_t count) const {
    PackedMatrix<Acc> some = w[i];
    some.K = count;
    if (some.data) some.data += some.vectors * some.G * kLanes<Acc> * k;
    return some;
  }

  void pack(int i, int64_t block, const void* source) const {
    const T* from = static_cast<const T*>(source);
    const int64_t K = w[i].K, some = columns(i);
    for (int64_t k = 0; k < K; k += some) {
      part(i, k, K - k < some ? K - k : some).pack(block, from + k, 1, K);
    }
  }

  int64_t size() const { return w[0].size() + w[1].size(); }
  void place(void* packed) {
    w[0].data = static_cast<Acc*>(packed);
    w[1].data = w[0].data + w[0].size();
  }
};

template <class T, class Cell>
struct PackedStep {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int G = Cell::G;
  // Of a cell with a sum for both products of each gate the second is added to the first.
  static constexpr bool kApart = Cell::kSums > G;
  static constexpr int64_t kRows = 512;  // that a panel meets

  const CellStepPackedArgs& args;
  const CellStepInputs& in;
  int64_t members;
  Arena arena;
  StepWeights<T> weights;
  int64_t sum_row;
  Counter* counters;
  int64_t left_row[2];
  bool in_place[2];  // x and h are read where they are
  Acc* left[2];      // else [B, left_row], as tiles read them
  Acc* panels;       // [members, panel_size()], unless the weights are packed
  Acc* sums;         // [members, most_rows(), sum_row] the products of a block: [G, panel] of both
                     // or, apart, of each

  PackedStep(const CellStepPackedArgs& args, int64_t members, char* base)
      : args(args),
        in(args.step.in),
        members(members),
        arena{base},
        weights(G, in.I, in.H, args.packed ? args.packed_members : members) {
    if (args.packed) weights.place(const_cast<void*>(args.packed));
    sum_row = sum_row_of(weights.w[0].width);
    for (int i = 0; i < 2; ++i) {
      in_place[i] = sizeof(T) == sizeof(Acc) && !weights.w[i].parts;
      left_row[i] = in_place[i] ? weights.w[i].K : weights.w[i].left_row();
      left[i] = in_place[i] ? static_cast<Acc*>(const_cast<void*>(source(i)))
                            : arena.take<Acc>(in.B * left_row[i]);
    }
    counters = arena.take<Counter>(counter_count());
    panels = args.packed ? nullptr : arena.take<Acc>(members * panel_size());
    sums = arena.take<Acc>(members * most_rows() * sum_row);
  }

  SEQKERN_INLINE int64_t sum_row_of(int64_t vectors) { return (kApart ? 2 : 1) * G * vectors * L; }
  int64_t most_rows() const { return in.B < kRows ? in.B : kRows; }
  const void* source(int i) const { return i ? in.h0 : in.x; }
  int64_t panel_size() const {
    const int64_t a = weights.part(0, 0, weights.columns(0)).panel_size(),
                  b = weights.part(1, 0, weights.columns(1)).panel_size();
    return a > b ? a : b;
  }
  int64_t row_items() const {
    return in_place[0] && in_place[1] ? 0 : (in.B + kRowBlock - 1) / kRowBlock;
  }
  int64_t counter_count() const { return 1 + row_items() + weights.w[0].blocks; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    const Chain chain{1, {row_items(), weights.w[0].blocks}, counters};
    run_chain(chain, member, members, [&](int64_t, int phase, int64_t item) {
      if (phase == 0) return put_rows(item * kRowBlock);
      for (int64_t b = 0; b < in.B; b += kRows) {
        step(item, b, in.B - b < kRows ? in.B - b : kRows, member);
      }
    });
  }

  void put_rows(int64_t first) const {
    const int64_t end = in.B - first < kRowBlock ? in.B : first + kRowBlock;
    for (int i = 0; i < 2; ++i) {
      const T* from = static_cast<const T*>(source(i));
      if (!from || in_place[i]) continue;
      for (int64_t b = first; b < end; ++b) {
        weights.w[i].put_row(left[i] + b * left_row[i], from + b * weights.w[i].K);
      }
    }
  }

  // A block of units of rows [b, b + rows).
  void step(int64_t block, int64_t b, int64_t rows, int64_t member) const {
    const PackedMatrix<Acc>& w = weights.w[0];
    const int64_t panel = w.width_of(block) * L, row = sum_row_of(w.width_of(block));
    const int64_t first = w.first_unit(block), units = w.units_of(block);
    Acc* all = sums + member * most_rows() * sum_row;
    multiply(0, static_cast<const T*>(in.w_ih), block, b, rows, all, member);
    if (in.h0) multiply(1, static_cast<const T*>(in.w_hh), block, b, rows, all, member);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < units; v += L) {
        const StepUnits<T> at{in.H, first + v, units - v < L ? units - v : L};
        const Acc* own = all + r * row + v;
        Cell::template forward<T>(args.step, b + r, at, [&](int s) __attribute__((always_inline)) {
          return sum_of(own, panel, s);
        });
      }
    }
  }

  // Sum s of the units whose first product is at `own`.
  __attribute__((always_inline)) V sum_of(const Acc* own, int64_t panel, int s) const {
    if constexpr (!kApart) return load(own + s * panel);
    V sum = s < G ? load(own + s * panel) : V{};
    for (int g = 0; in.h0 && g < G; ++g) {
      if (Cell::recurrent_sum(g) == s) sum += load(own + (G + g) * panel);
    }
    return sum;
  }

  // out [rows, .., panel] = the products with matrix i, in their place of a row; + out with the
  // second where they share it.
  void multiply(int i, const T* source, int64_t block, int64_t b, int64_t rows, Acc* out,
                int64_t member) const {
    const int64_t K = weights.w[i].K, columns = weights.columns(i);
    const int64_t panel = weights.w[i].width_of(block) * L;
    const int64_t row = sum_row_of(weights.w[i].width_of(block));
    if (kApart) out += i * G * panel;
    for (int64_t k = 0; k < K; k += columns) {
      const PackedMatrix<Acc> w = weights.part(i, k, K - k < columns ? K - k : columns);
      const Acc* a = left[i] + b * left_row[i] + k;
      for (int g = 0; g < w.panels(); ++g) {
        const PackedMatrix<Acc> some =
            w.panel_of(block, g, args.packed ? nullptr : panels + member * panel_size());
        if (!args.packed) some.pack(block, source + g * w.units * K + k, 1, K);
        for (int64_t r = 0; r < rows; r += kRowBlock) {
          product(some, block, a + r * left_row[i], left_row[i],
                  rows - r < kRowBlock ? rows - r : kRowBlock, out + r * row + g * panel, row,
                  k > 0 || (i > 0 && !kApart));
        }
      }
    }
  }
};

template <class T>
StepWeights<T> weights_of(const CellStepPackArgs& args) {
  StepWeights<T> weights(static_cast<int>(args.G), args.I, args.H, args.members);
  if (args.packed) weights.place(args.packed);
  return weights;
}

}  // namespace

int64_t cell_step_pack_workspace(const CellStepPackArgs& args, int64_t) {
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return weights_of<T>(args).size() * static_cast<int64_t>(sizeof(AccOf<T>));
  });
}
void cell_step_pack_prepare(const CellStepPackArgs&, int64_t) {}
void cell_step_pack(const CellStepPackArgs& args, int64_t members, int64_t member) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    const auto weights = weights_of<typename decltype(tag)::type>(args);
    const int64_t blocks = weights.w[0].blocks;
    for (int64_t n = blocks * member / members; n < blocks * (member + 1) / members; ++n) {
      weights.pack(0, n, args.w_ih);
      weights.pack(1, n, args.w_hh);
    }
  });
}

int64_t cell_step_packed_workspace(const CellStepPackedArgs& args, int64_t members) {
  return dispatch_step(args.step.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    return PackedStep<T, Cell>(args, members, nullptr).arena.used;
  });
}
void cell_step_packed_prepare(const CellStepPackedArgs& args, int64_t members) {
  dispatch_step(args.step.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    PackedStep<T, Cell>(args, members, static_cast<char*>(args.workspace)).prepare();
  });
}
void cell_step_packed(const CellStepPackedArgs& args, int64_t members, int64_t member) {
  dispatch_step(args.step.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    const ProductSession session;
    PackedStep<T, Cell>(args, members, static_cast<char*>(args.workspace)).run(member);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
