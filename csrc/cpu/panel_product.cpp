// out = a b^T (+ out).
//
// Both operands are turned into panels first. The smaller one is shared: the threads do that
// together. Of the other each thread packs some panels, and meets all shared ones with them, a part
// of K at a time: of a panel that first-level cache holds while those of the other side pass by.
#include "cpu/panel_product.h"

#include "cpu/bf16_pairs.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int64_t kMostPanels = 4;    // that a thread packs at a time
constexpr int64_t kFewestShared = 4;  // panels that pay for packing one again

#if defined(SEQKERN_TILES) || defined(SEQKERN_BF16_PAIRS)

constexpr int64_t kPanelRows = 2 * kTileHeight;
constexpr int64_t kPanelStep = 2 * kTileNumbers;  // numbers of a panel for kTileDepth of K

#if defined(SEQKERN_TILES)

// Writing a tile register takes as long as multiplying two, so the matrix unit multiplies two tiles
// of a by two of b, four loads for four products, and two of the four are of a panel that stays in
// first-level cache.
//
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

#endif

// Of bf16, in tiles.
struct Panels {
  using Number = uint16_t;
  static constexpr int64_t kRows = kPanelRows, kColumns = kPanelRows;  // of a panel of a, of b
  static constexpr int64_t kStep = kTileDepth;                         // K is filled up to these
  // Of K that is met at a time. Of the matrix unit's four loads for four products two come from
  // second-level cache, which is as much as it gives: 16 KB of each side leave room for the sums.
  static constexpr int64_t kPart = kMatrixUnit ? 256 : 512;
  // Whether a thread's own panel stays in first-level cache while the shared ones pass by.
  static constexpr bool kOwnStay = kMatrixUnit;

  // Around all products of a thread.
#if defined(SEQKERN_TILES)
  TileSession tiles;
  Panels() { shape_tiles(kTileHeight, 7); }
#else
  Panels() {}
#endif

  static void pack_a(const PanelOperand& m, int64_t first, int64_t K, Number* to) {
    pack<true>(m, first, K, to);
  }
  static void pack_b(const PanelOperand& m, int64_t first, int64_t K, Number* to) {
    pack<false>(m, first, K, to);
  }
  template <bool kWordsOfRows>
  static void pack(const PanelOperand& m, int64_t first, int64_t K, Number* to) {
    const Number* from = static_cast<const Number*>(m.data) + first * m.stride;
    for (int64_t k = 0; k < K; k += kTileDepth) {
      if constexpr (kMatrixUnit) ask_for(m, first, k + 2 * kTileDepth, K);
      for (int64_t i = 0; i < kPanelRows; i += kTileHeight, to += kTileNumbers) {
        if (i >= m.size - first) {
          __builtin_memset(to, 0, kTileNumbers * sizeof(Number));
          continue;
        }
        pack_tile<kWordsOfRows>(to, from + i * m.stride + k * m.k_stride, m.stride, m.k_stride,
                                m.size - first - i, K - k);
      }
    }
  }

  // The lines of a panel at k, if they lie along rows or columns: as many places as no hardware
  // looks ahead at.
  static void ask_for(const PanelOperand& m, int64_t first, int64_t k, int64_t K) {
    const bool along = m.k_stride == 1;
    const Number* from = static_cast<const Number*>(m.data) + first * m.stride + k * m.k_stride;
    const int64_t left = along ? m.size - first : K - k;
    for (int64_t i = 0; k < K && i < left && i < kPanelRows; ++i) {
      __builtin_prefetch(from + i * (along ? m.stride : m.k_stride));
    }
  }

  // out = (out +) a panel of a times one of b, at least [rows, columns] of it.
  static void multiply(const Number* a, const Number* b, int64_t K, float* out, int64_t stride,
                       bool accumulate, int64_t rows, int64_t columns) {
#if defined(SEQKERN_TILES)
    if (columns > L) {
      rows > kTileHeight ? multiply_halves<true, true>(a, b, K, out, stride, accumulate)
                         : multiply_halves<false, true>(a, b, K, out, stride, accumulate);
    } else {
      rows > kTileHeight ? multiply_halves<true, false>(a, b, K, out, stride, accumulate)
                         : multiply_halves<false, false>(a, b, K, out, stride, accumulate);
    }
#else
    constexpr int kHeight = kPairRows<2>;
    for (int64_t r = 0; r < rows; r += kHeight) {
      const PairOperand left{a + r / kTileHeight * kTileNumbers + r % kTileHeight * kTileDepth,
                             kTileDepth, kPanelStep};
      const PairOperand right{b, kTileNumbers, kPanelStep};
      float* to = out + r * stride;
      columns > L ? multiply_pairs<kHeight, 2>(left, right, K, to, stride, accumulate)
                  : multiply_pairs<kHeight, 1>(left, right, K, to, stride, accumulate);
    }
#endif
  }
};

#else

// Of floats: panels [K, rows] and [K, columns].
struct Panels {
  using Number = float;
  static constexpr int64_t kRows = 4 * kTileRows, kColumns = 48;
  static constexpr int64_t kStep = 1;
  static constexpr int64_t kPart = 256;
  static constexpr bool kOwnStay = false;
  static_assert(kRows % L == 0 && kColumns % (kTileVectors * L) == 0);

  Panels() {}

  static void pack_a(const PanelOperand& m, int64_t first, int64_t K, Number* to) {
    pack<kRows>(m, first, K, to);
  }
  static void pack_b(const PanelOperand& m, int64_t first, int64_t K, Number* to) {
    pack<kColumns>(m, first, K, to);
  }
  template <int64_t kWidth>
  static void pack(const PanelOperand& m, int64_t first, int64_t K, Number* to) {
    const Number* from = static_cast<const Number*>(m.data) + first * m.stride;
    for (int64_t i = 0; i < kWidth; i += L) {
      const int64_t left = m.size - first - i;
      if (left > 0) {
        pack_lanes<float>(to + i, kWidth, from + i * m.stride, m.k_stride, m.stride, K,
                          left < L ? left : L);
      } else {
        for (int64_t k = 0; k < K; ++k) store(to + i + k * kWidth, VecF{});
      }
    }
  }

  static void multiply(const Number* a, const Number* b, int64_t K, float* out, int64_t stride,
                       bool accumulate, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c += kTileVectors * L) {
      const int64_t vectors = (columns - c + L - 1) / L;
      with_vectors(vectors < kTileVectors ? vectors : kTileVectors, [&](auto count) {
        for (int64_t r = 0; r < rows; r += kTileRows) {
          multiply_in_chains<float, kTileRows, decltype(count)::value>(
              out + r * stride + c, stride, accumulate, a + r, 1, kRows, b + c, K, kColumns);
        }
      });
    }
  }
};

#endif

struct PanelProduct {
  using Number = Panels::Number;
  static constexpr int64_t kRows = Panels::kRows, kColumns = Panels::kColumns;

  const PanelProductArgs& args;
  int64_t members;
  Arena arena;
  int64_t K;  // filled up
  bool a_is_shared;
  int64_t shared_panels, own_panels, shared_size, own_size;
  int64_t some;    // own panels of an item
  int64_t splits;  // of the shared ones, each with items of its own: where own ones are few
  int64_t items;
  Counter* counters;
  Number* shared;  // [shared_panels, shared_size]
  Number* own;     // [members, some, own_size]

  PanelProduct(const PanelProductArgs& args, int64_t members, char* base)
      : args(args),
        members(members),
        arena{base},
        K((args.K + Panels::kStep - 1) / Panels::kStep * Panels::kStep),
        a_is_shared(args.a.size <= args.b.size) {
    const int64_t of_a = (args.a.size + kRows - 1) / kRows;
    const int64_t of_b = (args.b.size + kColumns - 1) / kColumns;
    shared_panels = a_is_shared ? of_a : of_b;
    own_panels = a_is_shared ? of_b : of_a;
    shared_size = K * (a_is_shared ? kRows : kColumns);
    own_size = K * (a_is_shared ? kColumns : kRows);
    // Several items for each thread, so that they end together.
    const int64_t wanted = 4 * members;
    some = own_panels / wanted;
    some = some < 1 ? 1 : some > kMostPanels ? kMostPanels : some;
    splits = wanted / own_panels;
    const int64_t most_splits = shared_panels / kFewestShared;
    splits = splits > most_splits ? most_splits : splits;
    if (splits < 1 || members == 1) splits = 1;
    items = (own_panels + some - 1) / some * splits;
    counters = arena.take<Counter>(counter_count());
    shared = arena.take<Number>(shared_panels * shared_size);
    own = arena.take<Number>(members * some * own_size);
  }

  int64_t counter_count() const { return 1 + shared_panels + items; }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    Number* panels = own + member * some * own_size;
    run_chain(Chain{1, {shared_panels, items}, counters}, member, members,
              [&](int64_t, int phase, int64_t item) {
                if (phase == 0) return pack(item, a_is_shared, shared + item * shared_size);
                multiply(item, panels);
              });
  }

  void pack(int64_t index, bool of_a, Number* to) const {
    of_a ? Panels::pack_a(args.a, index * kRows, args.K, to)
         : Panels::pack_b(args.b, index * kColumns, args.K, to);
  }

  void multiply(int64_t item, Number* panels) const {
    const int64_t split = item % splits, first = item / splits * some;
    const int64_t s_begin = shared_panels * split / splits;
    const int64_t s_end = shared_panels * (split + 1) / splits;
    const int64_t count = own_panels - first < some ? own_panels - first : some;
    for (int64_t p = 0; p < count; ++p) pack(first + p, !a_is_shared, panels + p * own_size);
    const int64_t steps = K / Panels::kStep, parts = (K + Panels::kPart - 1) / Panels::kPart;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = steps * part / parts * Panels::kStep;
      const int64_t end = part + 1 < parts ? steps * (part + 1) / parts * Panels::kStep : args.K;
      const int64_t skip_shared = begin * (shared_size / K), skip_own = begin * (own_size / K);
      const bool continued = part > 0 || args.accumulate;
      const auto pair = [&](int64_t s, int64_t p, int64_t next_s, int64_t next_p) {
        if (continued) fetch(next_s, first + next_p);
        meet(s, shared + s * shared_size + skip_shared, first + p, panels + p * own_size + skip_own,
             end - begin, continued);
      };
      if constexpr (Panels::kOwnStay) {
        for (int64_t p = 0; p < count; ++p) {
          for (int64_t s = s_begin; s < s_end; ++s) {
            s + 1 < s_end ? pair(s, p, s + 1, p) : pair(s, p, s_begin, p + 1);
          }
        }
      } else {
        for (int64_t s = s_begin; s < s_end; ++s) {
          for (int64_t p = 0; p < count; ++p) {
            p + 1 < count ? pair(s, p, s, p + 1) : pair(s, p, s + 1, 0);
          }
        }
      }
    }
  }

  // Where in out two panels meet.
  struct Place {
    int64_t n, m, rows, columns;
  };
  Place place(int64_t s, int64_t o) const {
    const int64_t n = (a_is_shared ? s : o) * kRows, m = (a_is_shared ? o : s) * kColumns;
    return {n, m, args.a.size - n, args.b.size - m};
  }

  // What the next two panels will add to, which may lie in memory.
  void fetch(int64_t s, int64_t o) const {
    const Place at = place(s, o);
    if (at.columns <= 0) return;
    const float* from = args.out + at.n * args.out_stride + at.m;
    for (int64_t i = 0; i < kRows && i < at.rows; ++i) {
      for (int64_t j = 0; j < kColumns; j += 16) {
        __builtin_prefetch(from + i * args.out_stride + j, 1);
      }
    }
  }

  void meet(int64_t s, const Number* from_shared, int64_t o, const Number* from_own, int64_t part,
            bool continued) const {
    const Place at = place(s, o);
    const Number* a = a_is_shared ? from_shared : from_own;
    const Number* b = a_is_shared ? from_own : from_shared;
    float* out = args.out + at.n * args.out_stride + at.m;
    if (at.rows >= kRows && at.columns >= kColumns) [[likely]] {
      return Panels::multiply(a, b, part, out, args.out_stride, continued, kRows, kColumns);
    }
    const int64_t rows = at.rows < kRows ? at.rows : kRows;
    const int64_t columns = at.columns < kColumns ? at.columns : kColumns;
    alignas(64) float sums[kRows * kColumns] = {};
    if (continued) {
      for (int64_t i = 0; i < rows; ++i) {
        __builtin_memcpy(sums + i * kColumns, out + i * args.out_stride, columns * sizeof(float));
      }
    }
    Panels::multiply(a, b, part, sums, kColumns, continued, rows, columns);
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_memcpy(out + i * args.out_stride, sums + i * kColumns, columns * sizeof(float));
    }
  }
};

}  // namespace

int64_t panel_product_workspace(const PanelProductArgs& args, int64_t members) {
  return PanelProduct(args, members, nullptr).arena.used;
}
void panel_product_prepare(const PanelProductArgs& args, int64_t members) {
  PanelProduct(args, members, static_cast<char*>(args.workspace)).prepare();
}
void panel_product(const PanelProductArgs& args, int64_t members, int64_t member) {
  const Panels session;
  PanelProduct(args, members, static_cast<char*>(args.workspace)).run(member);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
