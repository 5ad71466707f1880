// ops::lstm_cell and its backward, one step: check, allocate, run.
#include "ops/lstm.h"
#include "torch/lstm.h"
#include "torch/ops_recurrent.h"

namespace seqkern {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The tensors of a step, checked and contiguous.
struct Cell {
  DType dtype;
  int64_t B, I, H;
  Tensor x, h, c, w_ih, w_hh;

  Cell(std::string_view op, const Tensor& input, const Tensor& h0, const Tensor& c0,
       const Tensor& w_ih, const Tensor& w_hh)
      : dtype(float_dtype(input, op, "input")) {
    check(input.dim() == 2, op, ": input must be [B, I], got ", describe(input));
    check(w_ih.dim() == 2 && w_ih.size(0) >= 4 && w_ih.size(0) % 4 == 0, op,
          ": w_ih must be [4 H, I], got ", describe(w_ih));
    B = input.size(0), I = input.size(1), H = w_ih.size(0) / 4;
    const Checker checked{op, input};
    x = checked(input, "input", {B, I});
    h = checked(h0, "h", {B, H});
    c = checked(c0, "c", {B, H});
    this->w_ih = checked(w_ih, "w_ih", {4 * H, I});
    this->w_hh = checked(w_hh, "w_hh", {4 * H, H});
  }

#if defined(SEQKERN_BACKEND_CPU)
  cpu::LstmStepInputs step(const OptionalTensor& b_ih, const OptionalTensor& b_hh) const {
    return {.dtype = dtype,
            .B = B,
            .I = I,
            .H = H,
            .x = x.const_data_ptr(),
            .h0 = h.const_data_ptr(),
            .c0 = c.const_data_ptr(),
            .w_ih = w_ih.const_data_ptr(),
            .w_hh = w_hh.const_data_ptr(),
            .b_ih = data(b_ih),
            .b_hh = data(b_hh)};
  }
#endif
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& h0,
                                             const Tensor& c0, const Tensor& w_ih,
                                             const Tensor& w_hh, const OptionalTensor& b_ih,
                                             const OptionalTensor& b_hh, bool save_gates) {
  constexpr std::string_view kOp = "lstm_cell";
  [[maybe_unused]] const Backend::Guard guard(input);
  const Cell cell(kOp, input, h0, c0, w_ih, w_hh);
  const auto [B, H] = std::pair(cell.B, cell.H);
  const Checker checked{kOp, input};
  const auto b_x = checked(b_ih, "b_ih", {4 * H}), b_h = checked(b_hh, "b_hh", {4 * H});
  const Tensor h1 = empty_on(input, cell.h.sizes(), input.scalar_type());
  const Tensor c1 = empty_on(input, cell.c.sizes(), input.scalar_type());
#if defined(SEQKERN_BACKEND_CPU)
  if (B <= Backend::kStepRows) {
    const Tensor gates =
        save_gates ? empty_on(input, Sizes({B, 4 * H}), input.scalar_type()) : nothing(input);
    if (B > 0) {
      Backend::run(cpu::LstmStepForwardArgs{.in = cell.step(b_x, b_h),
                                            .gates = mutable_data(gates, save_gates),
                                            .h = mutable_data(h1),
                                            .c = mutable_data(c1)});
    }
    return {h1, c1, gates};
  }
#endif
  const auto bias = bias_sum(b_x, b_h);
  const Tensor gates_x = mm(cell.x, torch::stable::transpose(cell.w_ih, 0, 1), {B, 4 * H});
  const Tensor gates_h = mm(cell.h, torch::stable::transpose(cell.w_hh, 0, 1), {B, 4 * H});
  if (B > 0) {
    Backend::run(LstmCellForwardArgs{.dtype = cell.dtype,
                                     .B = B,
                                     .H = H,
                                     .gates_x = gates_x.const_data_ptr(),
                                     .gates_h = gates_h.const_data_ptr(),
                                     .bias = data(bias),
                                     .c0 = cell.c.const_data_ptr(),
                                     .gates = mutable_data(gates_x, save_gates),
                                     .h = mutable_data(h1),
                                     .c = mutable_data(c1)});
  }
  return {h1, c1, save_gates ? gates_x : nothing(input)};
}

Gradients lstm_cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                             const Tensor& input, const Tensor& h0, const Tensor& c0,
                             const Tensor& w_ih, const Tensor& w_hh, const Tensor& c,
                             const Tensor& gates, int64_t needs) {
  constexpr std::string_view kOp = "lstm_cell_backward";
  [[maybe_unused]] const Backend::Guard guard(input);
  const Cell cell(kOp, input, h0, c0, w_ih, w_hh);
  const auto [B, I, H] = std::tuple(cell.B, cell.I, cell.H);
  const Checker checked{kOp, input};
  const Tensor c_after = checked(c, "saved c", {B, H});
  const Tensor kept = checked(gates, "gates", {B, 4 * H});
  const auto dh = checked(grad_h, "grad_h", {B, H});
  const auto dc = checked(grad_c, "grad_c", {B, H});
  const Tensor dc0 = empty_on(input, cell.c.sizes(), input.scalar_type());
#if defined(SEQKERN_BACKEND_CPU)
  if (B > 0 && B <= Backend::kStepRows) {
    const auto fresh = [&](int64_t bit, std::initializer_list<int64_t> size) {
      return needs & bit ? empty_on(input, Sizes(size.begin(), size.size()), input.scalar_type())
                         : nothing(input);
    };
    const Gradients grads = {
        fresh(kInput, {B, I}),   fresh(kH0, {B, H}),      dc0,
        fresh(kWih, {4 * H, I}), fresh(kWhh, {4 * H, H}), fresh(kBias, {4 * H})};
    cpu::LstmStepBackwardArgs args{.in = cell.step({}, {}),
                                   .gates = kept.const_data_ptr(),
                                   .c = c_after.const_data_ptr(),
                                   .dh = data(dh),
                                   .dc = data(dc),
                                   .dx = mutable_data(std::get<0>(grads), needs & kInput),
                                   .dh0 = mutable_data(std::get<1>(grads), needs & kH0),
                                   .dc0 = mutable_data(dc0),
                                   .dw_ih = mutable_data(std::get<3>(grads), needs & kWih),
                                   .dw_hh = mutable_data(std::get<4>(grads), needs & kWhh),
                                   .db = mutable_data(std::get<5>(grads), needs & kBias),
                                   .workspace = nullptr};
    const Scratch scratch(input, Backend::workspace_bytes(args));
    args.workspace = scratch.data();
    Backend::run(args);
    return grads;
  }
#endif
  const Tensor dgates = empty_on(input, kept.sizes(), input.scalar_type());
  if (B > 0) {
    Backend::run(LstmCellBackwardArgs{.dtype = cell.dtype,
                                      .B = B,
                                      .H = H,
                                      .gates = kept.const_data_ptr(),
                                      .c0 = cell.c.const_data_ptr(),
                                      .c = c_after.const_data_ptr(),
                                      .dh = data(dh),
                                      .dc = data(dc),
                                      .dgates = mutable_data(dgates),
                                      .dc0 = mutable_data(dc0)});
  }
  const int64_t rows[] = {0};
  return {
      needs & kInput ? mm(dgates, cell.w_ih, {B, I}) : nothing(input),
      needs & kH0 ? mm(dgates, cell.w_hh, {B, H}) : nothing(input),
      dc0,
      needs & kWih ? transposed_mm(dgates, cell.x) : nothing(input),
      needs & kWhh ? transposed_mm(dgates, cell.h) : nothing(input),
      needs & kBias ? torch::stable::sum(dgates, Sizes(rows, 1)) : nothing(input),
  };
}

}  // namespace seqkern
