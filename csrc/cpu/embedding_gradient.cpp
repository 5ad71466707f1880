// Sums of the rows of a matrix by the number each row carries.
//
// Added up where `out` is, each row would fetch and write a row of it. Here the rows of one number
// come one after the other and their sum stays in registers. As in weight_gradient.cpp, rows are
// added up a block at a time from zero: one by one, rounding would grow with their count.
#include "cpu/embedding_gradient.h"

#include "cpu/kernels.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kVectors = 8;  // of a row, summed together
constexpr int64_t kRowsOfBlock = 512;

template <class T>
struct EmbeddingGradient {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int L = kLanes<Acc>;

  const EmbeddingGradientArgs& args;

  // Columns [w, w + width) of all sums.
  void columns(int64_t w, int64_t width) const {
    for (int64_t id = 0; id < args.V; ++id) {
      if (width == kVectors * L) {
        sum(id, w, [](int) { return int64_t{L}; });
      } else {
        sum(id, w, [&](int j) {
          const int64_t rest = width - j * L;
          return rest < 0 ? int64_t{0} : rest < L ? rest : int64_t{L};
        });
      }
    }
  }

  // some(j): elements of vector j.
  template <class Some>
  __attribute__((always_inline)) void sum(int64_t id, int64_t w, Some some) const {
    const auto part = [&](const T* row, int j) __attribute__((always_inline)) {
      return load_part<Acc>(row + j * L, some(j));
    };
    const T* a = static_cast<const T*>(args.a) + w;
    T* out = static_cast<T*>(args.out) + id * args.W + w;
    const int64_t end = args.first[id + 1];
    if (args.accumulate && args.first[id] == end) return;
    V total[kVectors] = {};
    if (args.accumulate) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) total[j] = part(out, j);
    }
    for (int64_t i = args.first[id]; i < end;) {
      const int64_t stop = end - i < kRowsOfBlock ? end : i + kRowsOfBlock;
      V block[kVectors] = {};
      for (; i < stop; ++i) {
        const T* row = a + args.order[i] * args.a_stride;
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) block[j] += part(row, j);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) total[j] += block[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store_part<Acc>(out + j * L, total[j], some(j));
  }
};

}  // namespace

void embedding_gradient(const EmbeddingGradientArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kColumns = kVectors * kLanes<AccOf<T>>;
    const int64_t stop = end * kGradientColumns < args.W ? end * kGradientColumns : args.W;
    for (int64_t w = begin * kGradientColumns; w < stop; w += kColumns) {
      EmbeddingGradient<T>{args}.columns(w, stop - w < kColumns ? stop - w : kColumns);
    }
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
