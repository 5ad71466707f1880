// The pointwise part of one LSTM step, backward. Forward it follows the products
// (lstm_step_cell.h).
#include "cpu/kernels.h"
#include "cpu/lstm.h"
#include "cpu/recurrent.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
void backward_rows(const LstmCellBackwardArgs& args, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const int64_t H = args.H;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t u = 0; u < H; u += L) {
      const int64_t count = H - u < L ? H - u : L;
      const auto part = [&](const void* rows, int64_t n) __attribute__((always_inline)) {
        return rows ? load_part<Acc>(static_cast<const T*>(rows) + n * H + u, count) : V{};
      };
      const Gates<Acc> y = {part(args.gates, 4 * b), part(args.gates, 4 * b + 1),
                            part(args.gates, 4 * b + 2), part(args.gates, 4 * b + 3)};
      V dc = part(args.dc, b);
      const Gates<Acc> d =
          gate_gradients<Acc>(y, part(args.c0, b), vtanh(part(args.c, b)), part(args.dh, b), dc);
      T* d_b = static_cast<T*>(args.dgates) + b * args.dgates_row + u;
      store_part<Acc>(d_b, d.i, count);
      store_part<Acc>(d_b + H, d.f, count);
      store_part<Acc>(d_b + 2 * H, d.g, count);
      store_part<Acc>(d_b + 3 * H, d.o, count);
      store_part<Acc>(static_cast<T*>(args.dc0) + b * H + u, dc, count);
    }
  }
}

}  // namespace

void lstm_cell_backward(const LstmCellBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype,
                 [&](auto tag) { backward_rows<typename decltype(tag)::type>(args, begin, end); });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
