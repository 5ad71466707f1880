// out = a b^T (+ out) of bf16 numbers.
//
// Both operands are turned into panels first. The smaller one is shared: the threads do that
// together. Of the other each thread packs some panels, which its second-level cache holds, and
// meets all shared ones with them. A panel is two tiles of matrix_tiles.h wide: writing a tile
// register takes as long as multiplying two, so the matrix unit multiplies two tiles of a by two of
// b, four loads for four products, and two of the four are of a panel that stays in first-level
// cache.
#include "cpu/mixed_product.h"

#include "cpu/bf16_pairs.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kPanelRows = 2 * kTileHeight;
constexpr int64_t kPanelStep = 2 * kTileNumbers;  // numbers of a panel for kTileDepth of K
constexpr int64_t kDepths = 16;                   // of a panel that is met at a time: 32 KB
constexpr int64_t kMostPanels = 4;                // that a thread packs at a time

#if defined(SEQKERN_TILES)

// Around all products of a thread.
struct PanelSession {
  TileSession tiles;
  PanelSession() { shape_tiles(kTileHeight, 7); }
};

// out = (out +) a panel of a times one of b, the second half of either only if it has one. Tiles 0
// to 3 are out, 4 and 5 a, 6 and 7 b.
template <bool kTwoA, bool kTwoB>
void multiply_halves(const uint16_t* a, const uint16_t* b, int64_t K, float* out, int64_t stride,
                     bool accumulate) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  float* lower = out + kTileHeight * stride;
  if (accumulate) {
    load_tile<0>(out, bytes);
    if constexpr (kTwoB) load_tile<1>(out + L, bytes);
    if constexpr (kTwoA) load_tile<2>(lower, bytes);
    if constexpr (kTwoA && kTwoB) load_tile<3>(lower + L, bytes);
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t k = 0; k < K; k += kTileDepth, a += kPanelStep, b += kPanelStep) {
    load_tile<4>(a, 64);
    load_tile<6>(b, 64);
    multiply_tiles<0, 4, 6>();
    if constexpr (kTwoB) {
      load_tile<7>(b + kTileNumbers, 64);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (kTwoA) {
      load_tile<5>(a + kTileNumbers, 64);
      multiply_tiles<2, 5, 6>();
      if constexpr (kTwoB) multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(out, bytes);
  if constexpr (kTwoB) store_tile<1>(out + L, bytes);
  if constexpr (kTwoA) store_tile<2>(lower, bytes);
  if constexpr (kTwoA && kTwoB) store_tile<3>(lower + L, bytes);
}

// Of out [32, 32] at least [rows, columns].
void multiply_panels(const uint16_t* a, const uint16_t* b, int64_t K, float* out, int64_t stride,
                     bool accumulate, int64_t rows, int64_t columns) {
  if (columns > L) {
    rows > kTileHeight ? multiply_halves<true, true>(a, b, K, out, stride, accumulate)
                       : multiply_halves<false, true>(a, b, K, out, stride, accumulate);
  } else {
    rows > kTileHeight ? multiply_halves<true, false>(a, b, K, out, stride, accumulate)
                       : multiply_halves<false, false>(a, b, K, out, stride, accumulate);
  }
}

#else

struct PanelSession {
  PanelSession() {}
};

// Of out [32, 32] at least [rows, columns].
void multiply_panels(const uint16_t* a, const uint16_t* b, int64_t K, float* out, int64_t stride,
                     bool accumulate, int64_t rows, int64_t columns) {
  constexpr int kRows = kPairRows<2>;
  for (int64_t r = 0; r < rows && r < kPanelRows; r += kRows) {
    const PairOperand left{a + r / kTileHeight * kTileNumbers + r % kTileHeight * kTileDepth,
                           kTileDepth, kPanelStep};
    const PairOperand right{b, kTileNumbers, kPanelStep};
    float* to = out + r * stride;
    columns > L ? multiply_pairs<kRows, 2>(left, right, K, to, stride, accumulate)
                : multiply_pairs<kRows, 1>(left, right, K, to, stride, accumulate);
  }
}

#endif

struct MixedProduct {
  const MixedProductArgs& args;
  int64_t members;
  Arena arena;
  int64_t depths, panel;  // of K; numbers of a panel
  bool a_is_shared;
  int64_t shared_panels, own_panels;
  int64_t some;  // panels of an item
  int64_t items;
  Counter* counters;
  uint16_t* shared;  // [shared_panels, panel]
  uint16_t* own;     // [members, some, panel]

  MixedProduct(const MixedProductArgs& args, int64_t members, char* base)
      : args(args),
        members(members),
        arena{base},
        depths(tile_depths(args.K)),
        panel(depths * kPanelStep),
        a_is_shared(args.a.size <= args.b.size) {
    shared_panels = panels_of(a_is_shared ? args.a : args.b);
    own_panels = panels_of(a_is_shared ? args.b : args.a);
    // Several items for each thread, so that they end together.
    some = own_panels / (4 * members);
    some = some < 1 ? 1 : some > kMostPanels ? kMostPanels : some;
    items = (own_panels + some - 1) / some;
    counters = arena.take<Counter>(counter_count());
    shared = arena.take<uint16_t>(shared_panels * panel);
    own = arena.take<uint16_t>(members * some * panel);
  }

  static int64_t panels_of(const MixedOperand& m) { return (m.size + kPanelRows - 1) / kPanelRows; }
  int64_t counter_count() const { return 1 + shared_panels + items; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    uint16_t* panels = own + member * some * panel;
    run_chain(Chain{1, {shared_panels, items}, counters}, member, members,
              [&](int64_t, int phase, int64_t item) {
                if (phase == 0) return pack(item, true, shared + item * panel);
                multiply(item, panels);
              });
  }

  void pack(int64_t index, bool of_shared, uint16_t* to) const {
    if (of_shared == a_is_shared) return pack<true>(args.a, index, to);
    pack<false>(args.b, index, to);
  }
  template <bool kWordsOfRows>
  void pack(const MixedOperand& m, int64_t index, uint16_t* to) const {
    const uint16_t* from = static_cast<const uint16_t*>(m.data) + index * kPanelRows * m.stride;
    const int64_t rows = m.size - index * kPanelRows;
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t k = d * kTileDepth;
      for (int64_t i = 0; i < kPanelRows; i += kTileHeight, to += kTileNumbers) {
        if (i >= rows) {
          __builtin_memset(to, 0, kTileNumbers * sizeof(uint16_t));
          continue;
        }
        pack_tile<kWordsOfRows>(to, from + i * m.stride + k * m.k_stride, m.stride, m.k_stride,
                                rows - i, args.K - k);
      }
    }
  }

  void multiply(int64_t item, uint16_t* panels) const {
    const int64_t first = item * some;
    const int64_t count = own_panels - first < some ? own_panels - first : some;
    for (int64_t p = 0; p < count; ++p) pack(first + p, false, panels + p * panel);
    const int64_t parts = (depths + kDepths - 1) / kDepths;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t d = depths * part / parts;
      const int64_t end = part + 1 < parts ? depths * (part + 1) / parts * kTileDepth : args.K;
      const bool continued = part > 0 || args.accumulate;
      for (int64_t s = 0; s < shared_panels; ++s) {
        const uint16_t* from = shared + s * panel + d * kPanelStep;
        for (int64_t p = 0; p < count; ++p) {
          if (continued) {
            p + 1 < count ? fetch(s, first + p + 1) : fetch(s + 1, first);
          }
          meet(s, from, first + p, panels + p * panel + d * kPanelStep, end - d * kTileDepth,
               continued);
        }
      }
    }
  }

  // Where in out two panels meet.
  struct Place {
    int64_t n, m, rows, columns;
  };
  Place place(int64_t s, int64_t o) const {
    const int64_t n = (a_is_shared ? s : o) * kPanelRows, m = (a_is_shared ? o : s) * kPanelRows;
    return {n, m, args.a.size - n, args.b.size - m};
  }

  // What the next two panels will add to, which may lie in memory.
  void fetch(int64_t s, int64_t o) const {
    const Place at = place(s, o);
    if (at.columns <= 0) return;
    const float* from = args.out + at.n * args.out_stride + at.m;
    for (int64_t i = 0; i < kPanelRows && i < at.rows; ++i) {
      __builtin_prefetch(from + i * args.out_stride, 1);
      __builtin_prefetch(from + i * args.out_stride + L, 1);
    }
  }

  void meet(int64_t s, const uint16_t* from_shared, int64_t o, const uint16_t* from_own, int64_t K,
            bool continued) const {
    const Place at = place(s, o);
    const uint16_t* a = a_is_shared ? from_shared : from_own;
    const uint16_t* b = a_is_shared ? from_own : from_shared;
    float* out = args.out + at.n * args.out_stride + at.m;
    if (at.rows >= kPanelRows && at.columns >= kPanelRows) [[likely]] {
      return multiply_panels(a, b, K, out, args.out_stride, continued, kPanelRows, kPanelRows);
    }
    const int64_t rows = at.rows < kPanelRows ? at.rows : kPanelRows;
    const int64_t columns = at.columns < kPanelRows ? at.columns : kPanelRows;
    alignas(64) float sums[kPanelRows * kPanelRows] = {};
    if (continued) {
      for (int64_t i = 0; i < rows; ++i) {
        __builtin_memcpy(sums + i * kPanelRows, out + i * args.out_stride, columns * sizeof(float));
      }
    }
    multiply_panels(a, b, K, sums, kPanelRows, continued, rows, columns);
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_memcpy(out + i * args.out_stride, sums + i * kPanelRows, columns * sizeof(float));
    }
  }
};

}  // namespace

int64_t mixed_product_workspace(const MixedProductArgs& args, int64_t members) {
  return MixedProduct(args, members, nullptr).arena.used;
}
void mixed_product_prepare(const MixedProductArgs& args, int64_t members) {
  MixedProduct(args, members, static_cast<char*>(args.workspace)).prepare();
}
void mixed_product(const MixedProductArgs& args, int64_t members, int64_t member) {
  const PanelSession session;
  MixedProduct(args, members, static_cast<char*>(args.workspace)).run(member);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
