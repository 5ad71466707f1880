// Gradients of weights in the matrix unit: out = a^T b as rows of b^T times a, tokens as depth.
//
// Columns of b are turned into rows of parts, shared by all threads, some hundred tokens at a time.
// A thread then packs a block of columns of a, meets all of b's with it, and adds the result to
// that of the tokens before.
#pragma once

#include "cpu/recurrent.h"
#include "cpu/weight_gradient.h"

namespace seqkern::cpu::SEQKERN_ISA {

// Row n of what a part of a gradient is multiplied with; null for zeros.
template <class T>
const T* right_row(const WeightGradientPart& part, int64_t rows, int64_t n) {
  const int64_t row = n - part.shift;
  const T* edge = static_cast<const T*>(part.edge);
  if (row < 0) return edge ? edge + n * part.K : nullptr;
  if (row >= rows) return edge ? edge + (row - rows) * part.K : nullptr;
  return static_cast<const T*>(part.b) + row * part.K;
}

template <class T>
struct WeightGradientTiles {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kDepth = 512;  // tokens at a time

  const WeightGradientArgs& args;
  int64_t members;
  Arena arena;
  int64_t depth;
  PackedMatrix<float> a;  // [depth, M]
  int64_t strips[2];      // of 16 columns of each part's b
  int64_t all_strips;
  int64_t b_row, kept_row;
  Counter* counters;
  float* panels;  // [members, a block of a]
  float* b;       // [16 all_strips, b_row]
  float* sum;     // [a.vectors L]
  float* kept;    // [16 all_strips, kept_row] the sums so far, where one depth is not all

  WeightGradientTiles(const WeightGradientArgs& args, int64_t members, char* base)
      : args(args),
        members(members),
        arena{base},
        depth(args.N < kDepth ? args.N : kDepth),
        a(depth, args.M, 1, kRowBlock, members, kParts<T>),
        all_strips(0) {
    for (int i = 0; i < args.count; ++i) {
      strips[i] = (args.parts[i].K + L - 1) / L;
      all_strips += strips[i];
    }
    b_row = a.left_row();
    kept_row = padded<float>(a.vectors * L);
    counters = arena.take<Counter>(counter_count());
    panels = arena.take<float>(members * panel_size());
    b = arena.take<float>(all_strips * L * b_row);
    sum = arena.take<float>(a.vectors * L);
    kept = args.N > depth ? arena.take<float>(all_strips * L * kept_row) : nullptr;
  }

  int64_t panel_size() const { return a.width * a.vector_size(); }
  int64_t counter_count() const { return 1 + all_strips + a.blocks; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    const Chain steps{(args.N + depth - 1) / depth, {all_strips, a.blocks}, counters};
    run_chain(steps, member, members, [&](int64_t step, int phase, int64_t item) {
      const int64_t n = step * depth, rows = args.N - n < depth ? args.N - n : depth;
      if (phase == 0) return turn(item, n, rows);
      multiply(item, n, rows, panels + member * panel_size());
    });
  }

  // `a` with so many tokens as depth: the last may be fewer.
  PackedMatrix<float> of(int64_t rows) const {
    PackedMatrix<float> some = a;
    some.K = rows;
    return some;
  }

  // Where a strip of columns is: the part it belongs to and its first column there.
  struct Strip {
    const WeightGradientPart& part;
    int64_t k, columns;
  };
  Strip strip_of(int64_t item) const {
    const int index = item >= strips[0] ? 1 : 0;
    const int64_t k = (index ? item - strips[0] : item) * L, rest = args.parts[index].K - k;
    return {args.parts[index], k, rest < L ? rest : L};
  }

  // A strip of columns of b, rows [n, n + rows) of it, as rows of parts; the last ones are zeros.
  void turn(int64_t item, int64_t n, int64_t rows) const {
    const Strip strip = strip_of(item);
    const PackedMatrix<float> own = of(rows);
    float* to = b + item * L * b_row;
    for (int64_t i = 0; i < own.part_stride(); i += L) {
      VecF square[L];
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; ++j) {
        const T* row = i + j < rows ? right_row<T>(strip.part, args.N, n + i + j) : nullptr;
        square[j] = row ? load_part<float>(row + strip.k, strip.columns) : VecF{};
      }
      transpose(square);
      for (int64_t k = 0; k < L; ++k) own.put(to + k * b_row, i, square[k], L);
    }
  }

  void multiply(int64_t block, int64_t n, int64_t rows, float* panel) const {
    const int64_t first = a.first_unit(block), lanes = a.width_of(block) * L;
    const T* source = static_cast<const T*>(args.a) + n * args.a_stride;
    PackedMatrix<float> own = of(rows);
    own.data = panel - own.first_vector(block) * own.vector_size();
    own.pack(block, source, args.a_stride, 1);
    if (args.sum) add_up(block, source, n, rows);
    alignas(64) float sums[kProductSize<float>];
    for (int64_t s = 0; s < all_strips; ++s) {
      product(own, block, b + s * L * b_row, b_row, L, sums, lanes);
      float* before = kept ? kept + s * L * kept_row + first : nullptr;
      if (n > 0) {
        for (int64_t i = 0; i < L; ++i) {
          for (int64_t v = 0; v < lanes; v += L) {
            float* sum = sums + i * lanes + v;
            store(sum, load(sum) + load(before + i * kept_row + v));
          }
        }
      }
      if (n + rows == args.N) {
        write(strip_of(s), block, sums, lanes);
      } else {
        for (int64_t i = 0; i < L; ++i) {
          __builtin_memcpy(before + i * kept_row, sums + i * lanes, lanes * sizeof(float));
        }
      }
    }
  }

  // The sum of the columns of a block.
  void add_up(int64_t block, const T* source, int64_t n, int64_t rows) const {
    T* out = static_cast<T*>(args.sum);
    const int64_t end = a.first_unit(block) + a.units_of(block);
    for (int64_t m = a.first_unit(block); m < end; m += L) {
      const int64_t count = end - m < L ? end - m : L;
      VecF total = {};
      for (int64_t i = 0; i < rows; ++i) {
        total += load_part<float>(source + i * args.a_stride + m, count);
      }
      if (n > 0) {
        total += load(sum + m);
      } else if (args.accumulate) {
        total += load_part<float>(out + m, count);
      }
      store(sum + m, total);
      if (n + rows == args.N) store_part<float>(out + m, total, count);
    }
  }

  // sums [16 columns of b, lanes of the block] to their place, which is the other way round.
  void write(const Strip& strip, int64_t block, const float* sums, int64_t lanes) const {
    const int64_t K = strip.part.K, units = a.units_of(block);
    T* out = static_cast<T*>(strip.part.out) + a.first_unit(block) * K + strip.k;
    for (int64_t v = 0; v < units; v += L) {
      VecF square[L];
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) square[k] = load(sums + k * lanes + v);
      transpose(square);
      for (int64_t m = 0; m < L && v + m < units; ++m) {
        T* to = out + (v + m) * K;
        VecF all = square[m];
        if (args.accumulate) all += load_part<float>(to, strip.columns);
        store_part<float>(to, all, strip.columns);
      }
    }
  }
};

}  // namespace seqkern::cpu::SEQKERN_ISA
