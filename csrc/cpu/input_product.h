// W_ih x_t for the next few steps of a recurrence, made where it is used.
//
// As one product over the whole sequence it would go to memory and come back a step at a time. Here
// a block of units has it made for as many steps ahead as give the tiles work, in scratch that its
// steps find in second-level cache.
#pragma once

#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {

template <class T>
struct InputProduct {
  using Acc = AccOf<T>;
  // Rows of x that a panel of weights is fetched for.
  static constexpr int64_t kRows = 64;

  const RecurrentInputs& r;
  const Teams& teams;
  const T* x;           // [T, B, I] contiguous
  PackedMatrix<Acc> w;  // [I, H] per gate, in the blocks of w_hh
  const T* w_ih;        // [gates, H, I]
  int64_t ahead;        // steps
  int64_t x_row;
  Acc* rows;      // [members, ahead * most rows of a chain, x_row]
  Acc* panels;    // [members, one gate of a block], if each is used once
  Acc* products;  // a [ahead, rows of the chain, gates of the block] per block and chain

  // The steps [first, first + ahead) of a chain. Their rows lie one after the other, those of a
  // step at begins[step - first]; each member has its own copy of x.
  struct Steps {
    Acc* rows;
    Acc* panel;
    int64_t first = -1;
    int64_t copied = -1;
    int64_t begins[kRows + 1] = {};
  };

  InputProduct(const RecurrentInputs& r, const Teams& teams, const void* x, const void* w_ih,
               int64_t I, const PackedMatrix<Acc>& w_hh)
      : r(r),
        teams(teams),
        x(static_cast<const T*>(x)),
        w(w_hh),
        w_ih(static_cast<const T*>(w_ih)) {
    w.K = I;
    w.together = false;  // however few the rows of a step, there are many of x
    w.parts = tile_parts<T>(r.T * r.B, I);
    x_row = w.left_row();
    ahead = kRows / teams.most_rows();
    ahead = ahead < 1 ? 1 : ahead > r.T ? r.T : ahead;
  }

  // A lone chain has no other that waits for the panels: they are packed where the first product
  // needs them, a gate at a time, and what is packed next comes from memory meanwhile. Where all
  // steps are one product they are needed once, and all panels go to the same place in cache. (A
  // copy of 1 MB of weights is 2 MB that cores must take from each other.)
  bool packs() const { return teams.chains == 1; }
  bool uses_once() const { return packs() && ahead == r.T; }

  void take(Arena& arena) {
    if (uses_once()) {
      panels = arena.take<Acc>(teams.members * w.panel_size());
    } else {
      w.data = arena.take<Acc>(w.size());
    }
    rows = arena.take<Acc>(teams.members * ahead * teams.most_rows() * x_row);
    products = arena.take<Acc>(ahead * r.B * w.G * w.vectors * kLanes<Acc>);
  }

  // For several chains, before their first step.
  void pack(int64_t block) const { w.pack(block, w_ih, 1, w.K); }

  Steps steps_of(int64_t member) const {
    Steps steps;
    steps.rows = rows + member * ahead * teams.most_rows() * x_row;
    steps.panel = uses_once() ? panels + member * w.panel_size() : nullptr;
    return steps;
  }

  // Elements of a row of the products of a block.
  int64_t row_of(int64_t block) const { return w.G * w.width_of(block) * kLanes<Acc>; }

  // The products of `block` for the rows of step s, one [gates of the block] after the other; made
  // now if s is the first of its steps. before(gate) is called before each product of the first.
  template <class F>
  const Acc* at(Steps& steps, int64_t s, int64_t block, ChainRows chain, F before) const {
    const int64_t row = row_of(block);
    Acc* out =
        products + ahead * (w.first_vector(block) * w.G * kLanes<Acc> * r.B + chain.begin * row);
    if (steps.first != s - s % ahead) {
      steps.first = s - s % ahead;
      Running running{teams.steps + chain.begin, chain.end - chain.begin, chain.end - chain.begin};
      steps.begins[0] = 0;
      for (int64_t i = 0; i < ahead; ++i) {
        steps.begins[i + 1] = steps.begins[i] + running.when_growing(steps.first + i);
      }
    }
    if (steps.first == s) {
      copy(steps, chain);
      if (s == 0 && packs()) {
        for (int g = 0; g < w.G; ++g) {
          const PackedMatrix<Acc> gate = w.panel_of(block, g, steps.panel);
          gate.pack(block, w_ih + g * w.units * w.K, 1, w.K);
          before(g);
          if (g + 1 < w.G) {
            w.fetch(block, g + 1, w_ih, w.K);
          } else if (block + 1 < w.blocks) {
            w.fetch(block + 1, 0, w_ih, w.K);
          }
          multiply(gate, block, steps, out + g * w.width_of(block) * kLanes<Acc>, row);
        }
      } else {
        multiply(w, block, steps, out, row);
      }
    }
    return out + steps.begins[s - steps.first] * row;
  }

 private:
  void multiply(const PackedMatrix<Acc>& some_w, int64_t block, const Steps& steps, Acc* out,
                int64_t row) const {
    const int64_t count = steps.begins[ahead];
    for (int64_t i = 0; i < count; i += kRowBlock) {
      const int64_t some = count - i < kRowBlock ? count - i : kRowBlock;
      product(some_w, block, steps.rows + i * x_row, x_row, some, out + i * row, row);
    }
  }

  // Converted, and with rows that do not all begin in the same set of the cache.
  void copy(Steps& steps, ChainRows chain) const {
    if (steps.copied == steps.first) return;
    steps.copied = steps.first;
    Acc* to = steps.rows;
    for (int64_t i = 0; i < ahead; ++i) {
      for (int64_t n = 0; n < steps.begins[i + 1] - steps.begins[i]; ++n, to += x_row) {
        const int64_t p = chain.begin + n, t = time_of(r, teams.steps[p], steps.first + i);
        w.put_row(to, x + (t * r.B + teams.order[p]) * w.K);
      }
    }
  }
};

}  // namespace seqkern::cpu::SEQKERN_ISA
