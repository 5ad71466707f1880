// out = a b for many rows of a: b packed once, rows in blocks that stay in second-level cache.
#include "cpu/dense.h"

#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct Dense {
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kMostRows = 64;  // that a thread takes at a time
  static constexpr bool kConvert = sizeof(T) != sizeof(Acc);

  const DenseArgs& args;
  int64_t members;
  Arena arena;
  PackedMatrix<Acc> b;
  int64_t chunk_rows;
  int64_t a_row;
  bool in_place;  // a is read where it is
  Counter* counters;
  Acc* rows;  // [members, chunk_rows, a_row]

  Dense(const DenseArgs& args, int64_t members, char* base)
      : args(args),
        members(members),
        arena{base},
        b(args.K, args.M, 1, kMostRows, 1, tile_parts<T>(args.N, args.K)) {
    const int64_t share = (args.N / members + kRowBlock - 1) / kRowBlock * kRowBlock;
    chunk_rows = share < kRowBlock ? kRowBlock : share > kMostRows ? kMostRows : share;
    a_row = b.left_row();
    counters = arena.take<Counter>(counter_count());
    b.data = arena.take<Acc>(b.size());
    in_place = !kConvert && !b.parts && spread_over_cache<T>(args.a_stride);
    rows = in_place ? nullptr : arena.take<Acc>(members * chunk_rows * a_row);
  }

  int64_t chunks() const { return (args.N + chunk_rows - 1) / chunk_rows; }
  int64_t counter_count() const { return 2 + b.blocks + chunks(); }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    run_chain(Chain{1, {b.blocks, 0}, counters}, member, members, [&](int64_t, int, int64_t block) {
      b.pack(block, static_cast<const T*>(args.w), args.k_stride, args.m_stride);
    });
    run_chain(
        Chain{1, {chunks(), 0}, counters + 1 + b.blocks}, member, members,
        [&](int64_t, int, int64_t chunk) { multiply(chunk, rows + member * chunk_rows * a_row); });
  }

  // Rows of a as tiles read them.
  struct Rows {
    const Acc* data;
    int64_t stride;
  };

  Rows rows_of(int64_t first, int64_t count, Acc* copy) const {
    const T* from = static_cast<const T*>(args.a) + first * args.a_stride;
    if constexpr (!kConvert) {
      if (in_place) return {from, args.a_stride};
    }
    for (int64_t i = 0; i < count; ++i) b.put_row(copy + i * a_row, from + i * args.a_stride);
    return {copy, a_row};
  }

  void multiply(int64_t chunk, Acc* copy) const {
    const int64_t first = chunk * chunk_rows;
    const int64_t count = args.N - first < chunk_rows ? args.N - first : chunk_rows;
    const Rows a = rows_of(first, count, copy);
    for (int64_t block = 0; block < b.blocks; ++block) {
      const int64_t m = b.first_unit(block), width = b.units_of(block);
      const int64_t panel = b.width_of(block) * L;
      for (int64_t i = 0; i < count; i += kRowBlock) {
        const int64_t some = count - i < kRowBlock ? count - i : kRowBlock;
        T* out = static_cast<T*>(args.out) + (first + i) * args.M + m;
        if constexpr (sizeof(T) == sizeof(Acc)) {
          if (width == panel) {
            product(b, block, a.data + i * a.stride, a.stride, some, out, args.M);
            continue;
          }
        }
        alignas(64) Acc sums[kProductSize<Acc>];
        product(b, block, a.data + i * a.stride, a.stride, some, sums, panel);
        for (int64_t r = 0; r < some; ++r) {
          for (int64_t v = 0; v < width; v += L) {
            store_part<Acc>(out + r * args.M + v, load(sums + r * panel + v),
                            width - v < L ? width - v : L);
          }
        }
      }
    }
  }
};

}  // namespace

int64_t dense_workspace(const DenseArgs& args, int64_t members) {
  return dispatch_dtype(args.dtype, [&](auto tag) {
    return Dense<typename decltype(tag)::type>(args, members, nullptr).arena.used;
  });
}
void dense_prepare(const DenseArgs& args, int64_t members) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    Dense<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .prepare();
  });
}
void dense(const DenseArgs& args, int64_t members, int64_t member) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    const ProductSession session;
    Dense<typename decltype(tag)::type>(args, members, static_cast<char*>(args.workspace))
        .run(member);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
