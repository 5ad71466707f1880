// out = a^T b over many rows: both packed a few hundred rows at a time, in panels that the register
// tile reads one element and one row at a time.
//
// The rows packed together are added up from zero, then to the sum of those before: over all rows
// one by one, rounding would grow with the length of the sequence.
//
// Both gradients of a layer have the same left side, which is packed once, and added up while it
// is. Threads share the columns of a, so that each keeps its part of it in second-level cache.
#include "cpu/weight_gradient.h"

#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct WeightGradient {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;
  static constexpr bool kConvert = sizeof(T) != sizeof(Acc);
  static constexpr int64_t kDepth = 512;              // rows of a and b at a time
  static constexpr int64_t kGroup = 256 / kTileRows;  // panels of a that an item takes

  // The columns of b in panels of up to kTileVectors vectors.
  struct Right {
    int64_t vectors, panels;
    Acc* data;    // [panels, depth, vectors of the panel]
    Acc* result;  // [M, K] where `out` has not the precision to be added to

    int64_t first(int64_t panel) const { return vectors * panel / panels; }
    int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
  };

  const WeightGradientArgs& args;
  int64_t members;
  Arena arena;
  int64_t depth;
  int64_t left_panels, left_stride;
  int64_t groups;  // of panels of a
  int64_t pieces;  // in which the rows of b are packed
  Counter* counters;
  Acc* left;  // [left_panels, left_stride], of it [depth, kTileRows]
  Acc* sum;   // [left_panels, kTileRows]
  Right right[2];

  WeightGradient(const WeightGradientArgs& args, int64_t members, char* base)
      : args(args), members(members), arena{base}, depth(args.N < kDepth ? args.N : kDepth) {
    left_panels = (args.M + kTileRows - 1) / kTileRows;
    // Not a multiple of 4 KB: a row goes to as many panels as there are, side by side in the cache.
    left_stride = depth * kTileRows + 64 / static_cast<int64_t>(sizeof(Acc));
    groups = (left_panels + members * kGroup - 1) / (members * kGroup) * members;
    if (groups > left_panels) groups = left_panels;
    for (int i = 0; i < args.count; ++i) {
      right[i].vectors = (args.parts[i].K + L - 1) / L;
      right[i].panels = (right[i].vectors + kTileVectors - 1) / kTileVectors;
    }
    pieces = depth < 2 * members ? depth : 2 * members;
    counters = arena.take<Counter>(counter_count());
    left = arena.take<Acc>(left_panels * left_stride);
    sum = arena.take<Acc>(left_panels * kTileRows);
    for (int i = 0; i < args.count; ++i) {
      right[i].data = arena.take<Acc>(depth * right[i].vectors * L);
      right[i].result = kConvert ? arena.take<Acc>(args.M * args.parts[i].K)
                                 : static_cast<Acc*>(args.parts[i].out);
    }
  }

  int64_t counter_count() const { return 1 + groups + pieces + groups; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    const Chain blocks{(args.N + depth - 1) / depth, {groups + pieces, groups}, counters};
    run_chain(blocks, member, members, [&](int64_t step, int phase, int64_t item) {
      const int64_t n = step * depth, rows = args.N - n < depth ? args.N - n : depth;
      if (phase == 1) return multiply(item, n, rows);
      if (item < groups) return pack_left(item, n, rows);
      item -= groups;
      const int64_t begin = rows * item / pieces, end = rows * (item + 1) / pieces;
      for (int index = 0; index < args.count; ++index) pack_right(index, n, begin, end);
    });
  }

  int64_t first_panel(int64_t group) const { return left_panels * group / groups; }

  // The columns of a group, mostly by the thread that will multiply them: a line that another has
  // written takes long to fetch and longer to write again.
  void pack_left(int64_t group, int64_t n, int64_t rows) const {
    const int64_t first = first_panel(group), last = first_panel(group + 1);
    const T* a = static_cast<const T*>(args.a) + n * args.a_stride;
    for (int64_t i = 0; i < rows; ++i, a += args.a_stride) {
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t m = panel * kTileRows;
        Acc* to = left + panel * left_stride + i * kTileRows;
        if constexpr (!kConvert) {
          if (m + kTileRows <= args.M) {
            __builtin_memcpy(to, a + m, kTileRows * sizeof(T));
            continue;
          }
        }
        for (int j = 0; j < kTileRows; ++j) to[j] = m + j < args.M ? load1(a + m + j) : Acc(0);
      }
    }
  }

  void pack_right(int index, int64_t n, int64_t begin, int64_t end) const {
    const WeightGradientPart& part = args.parts[index];
    const Right& r = right[index];
    for (int64_t panel = 0; panel < r.panels; ++panel) {
      const int64_t first = r.first(panel), width = r.width(panel);
      Acc* to = r.data + (depth * first + begin * width) * L;
      for (int64_t i = begin; i < end; ++i) {
        const T* from = row_of(part, n + i);
        for (int64_t v = 0; v < width; ++v, to += L) {
          const int64_t k = (first + v) * L, some = part.K - k < L ? part.K - k : L;
          store(to, from ? load_part<Acc>(from + k, some) : V{});
        }
      }
    }
  }

  const T* row_of(const WeightGradientPart& part, int64_t n) const {
    const int64_t row = n - part.shift;
    const T* edge = static_cast<const T*>(part.edge);
    if (row < 0) return edge ? edge + n * part.K : nullptr;
    if (row >= args.N) return edge ? edge + (row - args.N) * part.K : nullptr;
    return static_cast<const T*>(part.b) + row * part.K;
  }

  void add_up(int64_t panel, int64_t n, int64_t rows) const {
    const Acc* from = left + panel * left_stride;
    Acc* sums = sum + panel * kTileRows;
    Acc total[kTileRows] = {};
    T* out = static_cast<T*>(args.sum) + panel * kTileRows;
    const int64_t columns = args.M - panel * kTileRows;
    for (int64_t i = 0; i < rows; ++i) {
      for (int j = 0; j < kTileRows; ++j) total[j] += from[i * kTileRows + j];
    }
    for (int j = 0; j < kTileRows && j < columns; ++j) {
      total[j] += n > 0 ? sums[j] : args.accumulate ? load1(out + j) : Acc(0);
      sums[j] = total[j];
    }
    if (n + rows < args.N) return;
    for (int j = 0; j < kTileRows && j < columns; ++j) store1(out + j, total[j]);
  }

  void multiply(int64_t group, int64_t n, int64_t rows) const {
    for (int64_t p = first_panel(group); args.sum && p < first_panel(group + 1); ++p) {
      add_up(p, n, rows);
    }
    for (int index = 0; index < args.count; ++index) {
      for (int64_t panel = 0; panel < right[index].panels; ++panel) {
        for (int64_t p = first_panel(group); p < first_panel(group + 1); ++p) {
          with_vectors(right[index].width(panel), [&](auto vectors) {
            tile<decltype(vectors)::value>(index, panel, p, n, rows);
          });
        }
      }
    }
  }

  template <int NV>
  __attribute__((noinline)) void tile(int index, int64_t panel, int64_t left_panel, int64_t n,
                                      int64_t rows) const {
    const Right& r = right[index];
    const int64_t K = args.parts[index].K, k = r.first(panel) * L, m = left_panel * kTileRows;
    const int64_t height = args.M - m < kTileRows ? args.M - m : kTileRows;
    Acc* result = r.result + m * K + k;
    const auto some = [&](int j) { return K - k - j * L < L ? K - k - j * L : L; };
    Tile<Acc, kTileRows, NV> c = {};
    multiply_add(c, left + left_panel * left_stride, 1, kTileRows, r.data + depth * k, rows);
    if (n > 0 || args.accumulate) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        if (i >= height) break;
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) c.c[i][j] += load_part<Acc>(result + i * K + j * L, some(j));
      }
    }
    const bool last = n + rows == args.N;
    T* out = static_cast<T*>(args.parts[index].out) + m * K + k;
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      if (i >= height) break;
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        if (kConvert && last) {
          store_part<Acc>(out + i * K + j * L, c.c[i][j], some(j));
        } else {
          store_part<Acc>(result + i * K + j * L, c.c[i][j], some(j));
        }
      }
    }
  }
};

}  // namespace

int64_t weight_gradient_workspace(const WeightGradientArgs& args, int64_t members) {
  return dispatch_dtype(args.dtype, [&](auto tag) {
    return WeightGradient<typename decltype(tag)::type>(args, members, nullptr).arena.used;
  });
}
void weight_gradient_prepare(const WeightGradientArgs& args, int64_t members) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    WeightGradient<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .prepare();
  });
}
void weight_gradient(const WeightGradientArgs& args, int64_t members, int64_t member) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    WeightGradient<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .run(member);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
