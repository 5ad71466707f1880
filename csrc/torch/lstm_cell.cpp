// ops::lstm_cell and its backward, one step: check, allocate, run.
#include "ops/lstm.h"
#include "torch/lstm.h"
#include "torch/ops_recurrent.h"

namespace seqkern {

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(const Tensor& input, const Tensor& h0,
                                                     const Tensor& c0, const Tensor& w_ih,
                                                     const Tensor& w_hh, const OptionalTensor& b_ih,
                                                     const OptionalTensor& b_hh,
                                                     [[maybe_unused]] const OptionalTensor& packed,
                                                     bool save_gates) {
  constexpr std::string_view kOp = "lstm_cell";
  [[maybe_unused]] const Backend::Guard guard(input);
  const CellTensors cell(kOp, 4, input, h0, c0, w_ih, w_hh);
  const auto [B, H] = std::pair(cell.B, cell.H);
  const Checker checked{kOp, input};
  const auto b_x = checked(b_ih, "b_ih", {4 * H}), b_h = checked(b_hh, "b_hh", {4 * H});
  const Tensor h1 = empty_on(input, cell.h.sizes(), input.scalar_type());
  const Tensor c1 = empty_on(input, cell.c->sizes(), input.scalar_type());
#if defined(SEQKERN_BACKEND_CPU)
  const PackedWeights* kept = packed_weights(kOp, packed, cell);
  const Tensor gates =
      save_gates ? empty_on(input, Sizes({B, 4 * H}), input.scalar_type()) : nothing(input);
  if (B > 0) {
    run_step(input,
             {.in = step_inputs(cell, cpu::StepCell::kLstm, b_x, b_h),
              .gates = mutable_data(gates, save_gates),
              .u_n = nullptr,
              .h = mutable_data(h1),
              .c = mutable_data(c1)},
             kept);
  }
  return {h1, c1, gates};
#else
  const auto bias = sum_of(b_x, b_h);
  const Tensor gates_x = mm(cell.x, transposed(cell.w_ih), {B, 4 * H});
  const Tensor gates_h = mm(cell.h, transposed(cell.w_hh), {B, 4 * H});
  if (B > 0) {
    Backend::run(LstmCellForwardArgs{.dtype = cell.dtype,
                                     .B = B,
                                     .H = H,
                                     .gates_x = gates_x.const_data_ptr(),
                                     .gates_h = gates_h.const_data_ptr(),
                                     .bias = data(bias),
                                     .c0 = data(cell.c),
                                     .gates = mutable_data(gates_x, save_gates),
                                     .h = mutable_data(h1),
                                     .c = mutable_data(c1)});
  }
  return {h1, c1, save_gates ? gates_x : nothing(input)};
#endif
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& h0,
                                             const Tensor& c0, const Tensor& w_ih,
                                             const Tensor& w_hh, const OptionalTensor& b_ih,
                                             const OptionalTensor& b_hh, bool save_gates) {
  return lstm_cell_forward(input, h0, c0, w_ih, w_hh, b_ih, b_hh, {}, save_gates);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input,
    const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh, const Tensor& c,
    const Tensor& gates, int64_t needs) {
  constexpr std::string_view kOp = "lstm_cell_backward";
  [[maybe_unused]] const Backend::Guard guard(input);
  const CellTensors cell(kOp, 4, input, h0, c0, w_ih, w_hh);
  const auto [B, H] = std::tuple(cell.B, cell.H);
  const Checker checked{kOp, input};
  const Tensor c_after = checked(c, "saved c", {B, H});
  const Tensor kept = checked(gates, "gates", {B, 4 * H});
  const auto dh = checked(grad_h, "grad_h", {B, H});
  const auto dc = checked(grad_c, "grad_c", {B, H});
  const Tensor dc0 = empty_on(input, cell.c->sizes(), input.scalar_type());
#if defined(SEQKERN_BACKEND_CPU)
  const StepGradients d = step_backward(cell, step_wanted(needs),
                                        {.in = step_inputs(cell, cpu::StepCell::kLstm),
                                         .gates = kept.const_data_ptr(),
                                         .c = c_after.const_data_ptr(),
                                         .dh = data(dh),
                                         .dc = data(dc),
                                         .dc0 = mutable_data(dc0)});
#else
  const Tensor dgates = empty_on(input, kept.sizes(), input.scalar_type());
  if (B > 0) {
    Backend::run(LstmCellBackwardArgs{.dtype = cell.dtype,
                                      .B = B,
                                      .H = H,
                                      .gates = kept.const_data_ptr(),
                                      .c0 = data(cell.c),
                                      .c = c_after.const_data_ptr(),
                                      .dh = data(dh),
                                      .dc = data(dc),
                                      .dgates = mutable_data(dgates),
                                      .dc0 = mutable_data(dc0)});
  }
  const StepGradients d = step_gradients(cell, step_wanted(needs), dgates, {}, {});
#endif
  return {d.input, d.h0, dc0, d.w_ih, d.w_hh, d.b_ih};
}

}  // namespace seqkern
