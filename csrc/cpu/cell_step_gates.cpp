// The pointwise part of one step of a cell, backward. Forward it follows the products.
#include "cpu/cell_step_units.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T, class Cell>
void backward_rows(const CellStepGatesArgs& args, int64_t begin, int64_t end) {
  using V = Vec<AccOf<T>>;
  constexpr int L = kLanes<AccOf<T>>;
  const int64_t H = args.step.in.H;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t u = 0; u < H; u += L) {
      const StepUnits<T> at{H, u, H - u < L ? H - u : L};
      const auto keep = [&](void* rows, int gate, V v) __attribute__((always_inline)) {
        at.store(rows ? static_cast<T*>(rows) + b * args.row : nullptr, gate, v);
      };
      const V past = Cell::template backward<T>(args.step, b, at,
                                                [&](int q, V v) __attribute__((always_inline)) {
                                                  if (q < Cell::G) keep(args.dgates, q, v);
                                                  for (int g = 0; g < Cell::G; ++g) {
                                                    if (Cell::recurrent_sum(g) == q)
                                                      keep(args.du, g, v);
                                                  }
                                                });
      at.store(args.past, b, past);
    }
  }
}

}  // namespace

void cell_step_gates(const CellStepGatesArgs& args, int64_t begin, int64_t end) {
  dispatch_step(args.step.in, [&]<class T, class Cell>(TypeTag<T>, Cell) {
    backward_rows<T, Cell>(args, begin, end);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
