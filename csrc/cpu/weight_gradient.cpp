// out = a^T b over many rows, on the register tile: a vector of columns of a times one column of b,
// row by row. a is read where it is if its rows lie well; b, the smaller side, is packed a few
// hundred rows at a time.
//
// The rows packed together are added up from zero, then to the sum of those before: over all rows
// one by one, rounding would grow with the length of the sequence.
//
// Both gradients of a layer have the same left side, whose columns the threads share; its sum is
// made on the way.
#include "cpu/weight_gradient.h"

#include "cpu/kernels.h"
#include "cpu/recurrent.h"
#include "cpu/weight_gradient_tiles.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct WeightGradient {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr bool kConvert = sizeof(T) != sizeof(Acc);
  static constexpr int64_t kDepth = 512;  // rows of a and b at a time
  static constexpr int64_t kTile = kTileRows * kPanel<Acc>;

  // The columns of a b, kTileRows at a time.
  struct Part {
    int64_t panels;
    int64_t first;  // panel, of those of all parts
  };

  const WeightGradientArgs& args;
  int64_t members;
  Arena arena;
  int64_t depth;
  Part parts[2];
  int64_t b_panels, b_stride;  // of all parts; elements of a panel
  int64_t vectors, a_panels;   // of the columns of a, up to kTileVectors in a panel
  bool a_in_place;
  int64_t items, pieces;  // of the tiles; in which the rows of a and b are packed
  Counter* counters;
  Acc* a;     // [a_panels, depth, vectors of the panel] unless it is read in place
  Acc* b;     // [b_panels, b_stride], of it [depth, kTileRows]
  Acc* kept;  // [a_panels, b_panels, kTile] tiles summed so far, where one depth is not all
  Acc* sum;   // [vectors L]

  WeightGradient(const WeightGradientArgs& args, int64_t members, char* base)
      : args(args), members(members), arena{base}, depth(args.N < kDepth ? args.N : kDepth) {
    b_panels = 0;
    for (int i = 0; i < args.count; ++i) {
      parts[i] = {(args.parts[i].K + kTileRows - 1) / kTileRows, b_panels};
      b_panels += parts[i].panels;
    }
    // Not a multiple of 4 KB: a row goes to as many panels as there are, side by side in the cache.
    b_stride = depth * kTileRows + 64 / static_cast<int64_t>(sizeof(Acc));
    vectors = (args.M + L - 1) / L;
    a_panels = (vectors + kTileVectors - 1) / kTileVectors;
    a_in_place = !kConvert && args.M % L == 0 && spread_over_cache<T>(args.a_stride);
    items = 4 * members;
    pieces = depth < 2 * members ? depth : 2 * members;
    counters = arena.take<Counter>(counter_count());
    a = a_in_place ? nullptr : arena.take<Acc>(depth * vectors * L);
    b = arena.take<Acc>(b_panels * b_stride);
    kept = args.N > depth ? arena.take<Acc>(a_panels * b_panels * kTile) : nullptr;
    sum = arena.take<Acc>(vectors * L);
  }

  int64_t counter_count() const { return 1 + pieces + items; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    const Chain blocks{(args.N + depth - 1) / depth, {pieces, items}, counters};
    run_chain(blocks, member, members, [&](int64_t step, int phase, int64_t item) {
      const int64_t n = step * depth, rows = args.N - n < depth ? args.N - n : depth;
      if (phase == 1) return multiply(item, n, rows);
      const int64_t begin = rows * item / pieces, end = rows * (item + 1) / pieces;
      for (int index = 0; index < args.count; ++index) pack_b(index, n, begin, end);
      if (!a_in_place) pack_a(n, begin, end);
    });
  }

  int64_t first_vector(int64_t panel) const { return vectors * panel / a_panels; }
  int64_t width(int64_t panel) const { return first_vector(panel + 1) - first_vector(panel); }

  void pack_b(int index, int64_t n, int64_t begin, int64_t end) const {
    const WeightGradientPart& part = args.parts[index];
    for (int64_t i = begin; i < end; ++i) {
      const T* from = right_row<T>(part, args.N, n + i);
      for (int64_t panel = 0; panel < parts[index].panels; ++panel) {
        const int64_t k = panel * kTileRows;
        Acc* to = b + (parts[index].first + panel) * b_stride + i * kTileRows;
        if constexpr (!kConvert) {
          if (from && k + kTileRows <= part.K) {
            __builtin_memcpy(to, from + k, kTileRows * sizeof(T));
            continue;
          }
        }
        for (int j = 0; j < kTileRows; ++j) {
          to[j] = from && k + j < part.K ? load1(from + k + j) : Acc(0);
        }
      }
    }
  }

  const T* a_row(int64_t n) const { return static_cast<const T*>(args.a) + n * args.a_stride; }

  void pack_a(int64_t n, int64_t begin, int64_t end) const {
    for (int64_t panel = 0; panel < a_panels; ++panel) {
      const int64_t first = first_vector(panel), some = width(panel);
      Acc* to = a + (depth * first + begin * some) * L;
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t v = first; v < first + some; ++v, to += L) {
          const int64_t m = v * L, count = args.M - m < L ? args.M - m : L;
          store(to, load_part<Acc>(a_row(n + i) + m, count));
        }
      }
    }
  }

  // Where a tile finds a panel of a, and elements from a row of it to the next.
  struct Panel {
    const Acc* data;
    int64_t row;
  };
  Panel a_panel(int64_t panel, int64_t n) const {
    const int64_t m = first_vector(panel) * L;
    if constexpr (!kConvert) {
      if (a_in_place) return {a_row(n) + m, args.a_stride};
    }
    return {a + depth * m, width(panel) * L};
  }

  // Tiles lie panel of a after panel of a; an item's are those that begin in its share of them.
  void multiply(int64_t item, int64_t n, int64_t rows) const {
    const int64_t all = vectors * b_panels;
    const int64_t begin = all * item / items, end = all * (item + 1) / items;
    for (int64_t p = 0; p < a_panels; ++p) {
      int64_t at = first_vector(p) * b_panels;
      if (at >= end) return;
      for (int64_t k = 0; k < b_panels; ++k, at += width(p)) {
        if (at < begin || at >= end) continue;
        with_vectors(width(p), [&](auto count) {
          constexpr int kVectors = decltype(count)::value;
          if (k == 0 && args.sum) add_up<kVectors>(p, n, rows);
          tile<kVectors>(p, k, n, rows);
        });
      }
    }
  }

  // Rows are added up in short runs, for they may all have one sign: then the rounding grows with
  // the sum.
  static constexpr int64_t kRun = 32;
  template <int NV>
  void add_up(int64_t panel, int64_t n, int64_t rows) const {
    const Panel from = a_panel(panel, n);
    const int64_t m = first_vector(panel) * L;
    T* out = static_cast<T*>(args.sum) + m;
    V total[NV] = {};
    for (int64_t i = 0; i < rows;) {
      const int64_t end = rows - i < kRun ? rows : i + kRun;
      V run[NV] = {};
      for (; i < end; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) run[j] += load(from.data + i * from.row + j * L);
      }
      for (int j = 0; j < NV; ++j) total[j] += run[j];
    }
    for (int j = 0; j < NV; ++j) {
      const int64_t rest = args.M - m - j * L, count = rest < L ? rest : L;
      if (n > 0) {
        total[j] += load(sum + m + j * L);
      } else if (args.accumulate) {
        total[j] += load_part<Acc>(out + j * L, count);
      }
      store(sum + m + j * L, total[j]);
      if (n + rows == args.N) store_part<Acc>(out + j * L, total[j], count);
    }
  }

  template <int NV>
  __attribute__((noinline)) void tile(int64_t a_index, int64_t b_index, int64_t n,
                                      int64_t rows) const {
    const Panel from = a_panel(a_index, n);
    const bool is_last = n + rows == args.N;
    alignas(64) Acc own[kTile];
    Acc* sums = kept ? kept + (a_index * b_panels + b_index) * kTile : own;
    Tile<Acc, kTileRows, NV> c = {};
    multiply_add(c, b + b_index * b_stride, 1, kTileRows, from.data, rows, from.row);
    if (n > 0 || args.accumulate) {
      if (n == 0) {
        const Target<NV> to(*this, a_index, b_index);
        to.each(sums, [](Acc& kept, const T& out) { kept = load1(&out); });
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) c.c[i][j] += load(sums + (i * NV + j) * L);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) store(sums + (i * NV + j) * L, c.c[i][j]);
    }
    if (is_last) Target<NV>(*this, a_index, b_index).write(sums);
  }

  // The part of `out` that is a tile's: the tile is [columns of b, columns of a], `out` the other
  // way round.
  template <int NV>
  struct Target {
    T* out;
    int64_t K, height, columns;

    Target(const WeightGradient& all, int64_t a_index, int64_t b_index) {
      const int index = all.args.count > 1 && b_index >= all.parts[1].first ? 1 : 0;
      const WeightGradientPart& part = all.args.parts[index];
      const int64_t k = (b_index - all.parts[index].first) * kTileRows;
      const int64_t m = all.first_vector(a_index) * L;
      K = part.K;
      height = K - k < kTileRows ? K - k : kTileRows;
      columns = all.args.M - m < NV * L ? all.args.M - m : NV * L;
      out = static_cast<T*>(part.out) + m * K + k;
    }

    // f(element of the tile, element of `out`).
    template <class F>
    void each(Acc* tile, F f) const {
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t i = 0; i < height; ++i) f(tile[i * NV * L + j], out[j * K + i]);
      }
    }

    void write(Acc* tile) const {
      if constexpr (!kConvert) {
        if (height == kTileRows && columns == NV * L) return write_whole(tile);
      }
      each(tile, [](Acc& kept, T& to) { store1(&to, kept); });
    }

    void write_whole(const Acc* tile) const {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
#pragma GCC unroll 4
        for (int first = 0; first < kTileRows; first += L) {
          V square[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            square[i] = first + i < kTileRows ? load(tile + ((first + i) * NV + j) * L) : V{};
          }
          transpose(square);
          const int some = kTileRows - first < L ? kTileRows - first : L;
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            __builtin_memcpy(out + (j * L + i) * K + first, &square[i], some * sizeof(Acc));
          }
        }
      }
    }
  };
};

// f(the sum to be made), in tiles where this processor has them for the dtype.
template <class F>
auto with_sum(const WeightGradientArgs& args, int64_t members, void* base, F f) {
  return dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    char* bytes = static_cast<char*>(base);
    if constexpr (kHasTiles && kParts<T> > 0) {
      return f(WeightGradientTiles<T>(args, members, bytes));
    } else {
      return f(WeightGradient<T>(args, members, bytes));
    }
  });
}

}  // namespace

int64_t weight_gradient_workspace(const WeightGradientArgs& args, int64_t members) {
  return with_sum(args, members, nullptr, [](const auto& sum) { return sum.arena.used; });
}
void weight_gradient_prepare(const WeightGradientArgs& args, int64_t members) {
  with_sum(args, members, args.workspace, [](const auto& sum) { sum.prepare(); });
}
void weight_gradient(const WeightGradientArgs& args, int64_t members, int64_t member) {
  const ProductSession session;
  with_sum(args, members, args.workspace, [&](const auto& sum) { sum.run(member); });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
