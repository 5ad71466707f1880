// out = a b. Of many rows and few columns b is packed once and met by rows in chunks that stay in
// second-level cache. Of few rows and many columns it is a that stays there: what a thread has
// packed of b it multiplies with all rows at once. Either way a row's bits are the same.
#include "cpu/dense.h"

#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct Dense {
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kMostRows = 64;       // that a thread takes at a time
  static constexpr int64_t kStripsOfMember = 4;  // at least, so that threads end together
  static constexpr bool kConvert = sizeof(T) != sizeof(Acc);

  const DenseArgs& args;
  int64_t members;
  Arena arena;
  PackedMatrix<Acc> b;
  int64_t chunk_rows;
  int64_t a_row;
  bool in_place;  // a is read where it is
  Counter* counters;
  bool few;    // rows
  Acc* rows;   // [N, a_row] with few, else [members, chunk_rows, a_row]; none if a is read in place
  Acc* strip;  // [members, strip_size()], with few rows, unless b is read in place

  Dense(const DenseArgs& args, int64_t members, char* base)
      : args(args),
        members(members),
        arena{base},
        b(args.K, args.M, 1, args.N < kMostRows ? args.N : kMostRows, 1,
          tile_parts<T>(kMostRows, args.K)),
        few(args.N <= kRowBlock ||
            (args.N <= args.M / 2 && b.blocks >= kStripsOfMember * members)) {
    const int64_t share = (args.N / members + kRowBlock - 1) / kRowBlock * kRowBlock;
    chunk_rows = few || share < kRowBlock ? kRowBlock : share > kMostRows ? kMostRows : share;
    a_row = b.left_row();
    counters = arena.take<Counter>(counter_count());
    if (args.m_stride == 1 && args.k_stride == args.M) b.template read_in_place<T>(args.w, args.N);
    b.data = few ? nullptr : arena.take<Acc>(b.size());
    strip = few && !b.in_place ? arena.take<Acc>(members * strip_size()) : nullptr;
    in_place = !kConvert && !b.parts && spread_over_cache<T>(args.a_stride);
    rows =
        in_place ? nullptr : arena.take<Acc>(few ? args.N * a_row : members * chunk_rows * a_row);
  }

  int64_t strip_size() const { return padded<Acc>(b.width * b.vector_size()); }
  int64_t chunks() const { return (args.N + chunk_rows - 1) / chunk_rows; }
  int64_t count_of(int64_t chunk) const {
    const int64_t first = chunk * chunk_rows;
    return args.N - first < chunk_rows ? args.N - first : chunk_rows;
  }
  int64_t counter_count() const { return 2 + b.blocks + chunks(); }
  void prepare() const { __builtin_memset(counters, 0, counter_count() * sizeof(Counter)); }

  void run(int64_t member) const {
    if (few) return run_strips(member);
    Acc* copy = rows + member * chunk_rows * a_row;
    run_chain(Chain{1, {b.blocks, 0}, counters}, member, members, [&](int64_t, int, int64_t block) {
      b.pack(block, static_cast<const T*>(args.w), args.k_stride, args.m_stride);
    });
    run_chain(Chain{1, {chunks(), 0}, counters + 1 + b.blocks}, member, members,
              [&](int64_t, int, int64_t chunk) { multiply(chunk, copy); });
  }

  void run_strips(int64_t member) const {
    const Chain chain{1, {in_place ? 0 : chunks(), b.blocks}, counters};
    run_chain(chain, member, members, [&](int64_t, int phase, int64_t item) {
      if (phase == 1) return multiply_strip(item, strip + member * strip_size());
      rows_of(item * chunk_rows, count_of(item), rows + item * chunk_rows * a_row);
    });
  }

  // The columns of a block as a matrix of their own.
  void multiply_strip(int64_t block, Acc* panel) const {
    const int64_t m = b.first_unit(block);
    const Rows a =
        in_place ? Rows{static_cast<const Acc*>(args.a), args.a_stride} : Rows{rows, a_row};
    T* out = static_cast<T*>(args.out) + m;
    if (b.in_place) return multiply_rows(b, block, a, args.N, out);
    PackedMatrix<Acc> columns(args.K, b.units_of(block), 1, args.N, 1, b.parts);
    columns.data = panel;
    columns.pack(0, static_cast<const T*>(args.w) + m * args.m_stride, args.k_stride,
                 args.m_stride);
    multiply_rows(columns, 0, a, args.N, out);
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
    const int64_t first = chunk * chunk_rows, count = count_of(chunk);
    const Rows a = rows_of(first, count, copy);
    T* out = static_cast<T*>(args.out) + first * args.M;
    for (int64_t block = 0; block < b.blocks; ++block) {
      multiply_rows(b, block, a, count, out + b.first_unit(block));
    }
  }

  // `count` rows of a block of columns, at out.
  void multiply_rows(const PackedMatrix<Acc>& w, int64_t block, Rows a, int64_t count,
                     T* out) const {
    const int64_t width = w.units_of(block), panel = w.width_of(block) * L;
    for (int64_t i = 0; i < count; i += kRowBlock, out += kRowBlock * args.M) {
      const int64_t some = count - i < kRowBlock ? count - i : kRowBlock;
      const Acc* left = a.data + i * a.stride;
      if constexpr (sizeof(T) == sizeof(Acc)) {
        if (width == panel) {
          product(w, block, left, a.stride, some, out, args.M);
          continue;
        }
      }
      alignas(64) Acc sums[kProductSize<Acc>];
      product(w, block, left, a.stride, some, sums, panel);
      for (int64_t r = 0; r < some; ++r) {
        for (int64_t v = 0; v < width; v += L) {
          store_part<Acc>(out + r * args.M + v, load(sums + r * panel + v),
                          width - v < L ? width - v : L);
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
