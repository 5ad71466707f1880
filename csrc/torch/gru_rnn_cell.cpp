// ops::gru_cell, ops::rnn_cell and their backwards, one step: check, allocate, run.
#include "torch/gru_rnn.h"
#include "torch/ops_recurrent.h"

namespace seqkern {
namespace {

struct Result {
  Tensor h;
  Tensor saved;  // GRU: gates [B, 3 H] and u_n [B, H], one after the other
};

// Where u_n is in what a GRU saves.
const void* u_n_of(const CellTensors& cell, const Tensor& saved) {
  return static_cast<const char*>(saved.const_data_ptr()) +
         3 * cell.B * cell.H * static_cast<int64_t>(saved.element_size());
}

Result forward(std::string_view op, HiddenCell kind, const Tensor& input, const Tensor& h0,
               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
               const OptionalTensor& b_hh, [[maybe_unused]] const OptionalTensor& packed,
               bool save_gates) {
  [[maybe_unused]] const Backend::Guard guard(input);
  const int64_t G = gates_of(kind);
  const CellTensors cell(op, G, input, h0, {}, w_ih, w_hh);
  const auto [B, H] = std::pair(cell.B, cell.H);
  const Checker checked{op, input};
  const auto b_x = checked(b_ih, "b_ih", {G * H}), b_h = checked(b_hh, "b_hh", {G * H});
  const ScalarType type = input.scalar_type();
  const Result y{.h = empty_on(input, cell.h.sizes(), type),
                 .saved = save_gates ? empty_on(input, Sizes({B, 4 * H}), type) : nothing(input)};
  void* gates = mutable_data(y.saved, save_gates);
  void* u_n = save_gates ? const_cast<void*>(u_n_of(cell, y.saved)) : nullptr;
#if defined(SEQKERN_BACKEND_CPU)
  const PackedWeights* kept = packed_weights(op, packed, cell);
  if (B > 0) {
    run_step(input,
             {.in = step_inputs(cell, step_cell(kind), b_x, b_h),
              .gates = gates,
              .u_n = u_n,
              .h = mutable_data(y.h),
              .c = nullptr},
             kept);
  }
#else
  const Tensor gates_x = mm(cell.x, transposed(cell.w_ih), {B, G * H});
  const Tensor gates_h = mm(cell.h, transposed(cell.w_hh), {B, G * H});
  if (B > 0) {
    Backend::run(HiddenCellForwardArgs{.dtype = cell.dtype,
                                       .cell = kind,
                                       .B = B,
                                       .H = H,
                                       .gates_x = gates_x.const_data_ptr(),
                                       .gates_h = gates_h.const_data_ptr(),
                                       .b_ih = data(b_x),
                                       .b_hh = data(b_h),
                                       .h0 = cell.h.const_data_ptr(),
                                       .gates = gates,
                                       .u_n = u_n,
                                       .h = mutable_data(y.h)});
  }
#endif
  return y;
}

StepGradients backward(std::string_view op, HiddenCell kind, const OptionalTensor& grad_h,
                       const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                       const Tensor& w_hh, const Tensor& saved, int64_t needs) {
  [[maybe_unused]] const Backend::Guard guard(input);
  const bool gru = kind == HiddenCell::kGru;
  const CellTensors cell(op, gates_of(kind), input, h0, {}, w_ih, w_hh);
  const auto [B, H] = std::pair(cell.B, cell.H);
  const Checker checked{op, input};
  const Tensor kept = checked(saved, gru ? "gates" : "saved h", {B, (gru ? 4 : 1) * H});
  const auto dh = checked(grad_h, "grad_h", {B, H});
  const void* gates = gru ? kept.const_data_ptr() : nullptr;
  const void* u_n = gru ? u_n_of(cell, kept) : nullptr;
  const void* h = gru ? nullptr : kept.const_data_ptr();
#if defined(SEQKERN_BACKEND_CPU)
  return step_backward(cell, step_wanted(needs),
                       {.in = step_inputs(cell, step_cell(kind)),
                        .gates = gates,
                        .u_n = u_n,
                        .h = h,
                        .dh = data(dh)});
#else
  const int64_t size[] = {B, gates_of(kind) * H};
  const auto fresh = [&](Sizes sizes) { return empty_on(input, sizes, input.scalar_type()); };
  const Tensor dgates = fresh(Sizes(size, 2));
  OptionalTensor du, past;
  if (gru) du = fresh(Sizes(size, 2)), past = fresh(cell.h.sizes());
  if (B > 0) {
    Backend::run(HiddenCellBackwardArgs{.dtype = cell.dtype,
                                        .cell = kind,
                                        .B = B,
                                        .H = H,
                                        .gates = gates,
                                        .u_n = u_n,
                                        .h0 = cell.h.const_data_ptr(),
                                        .h = h,
                                        .dh = data(dh),
                                        .dgates = mutable_data(dgates),
                                        .du = gru ? mutable_data(*du) : nullptr,
                                        .past = gru ? mutable_data(*past) : nullptr});
  }
  return step_gradients(cell, step_wanted(needs), dgates, du, past);
#endif
}

}  // namespace

std::tuple<Tensor, Tensor> gru_cell_forward(const Tensor& input, const Tensor& h0,
                                            const Tensor& w_ih, const Tensor& w_hh,
                                            const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                            const OptionalTensor& packed, bool save_gates) {
  const Result y =
      forward("gru_cell", HiddenCell::kGru, input, h0, w_ih, w_hh, b_ih, b_hh, packed, save_gates);
  return {y.h, y.saved};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                                    const Tensor& w_hh, const OptionalTensor& b_ih,
                                    const OptionalTensor& b_hh, bool save_gates) {
  return gru_cell_forward(input, h0, w_ih, w_hh, b_ih, b_hh, {}, save_gates);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(
    const OptionalTensor& grad_h, const Tensor& input, const Tensor& h0, const Tensor& w_ih,
    const Tensor& w_hh, const Tensor& gates, int64_t needs) {
  const StepGradients d =
      backward("gru_cell_backward", HiddenCell::kGru, grad_h, input, h0, w_ih, w_hh, gates, needs);
  return {d.input, d.h0, d.w_ih, d.w_hh, d.b_ih, d.b_hh};
}

Tensor rnn_cell_forward(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                        const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                        const OptionalTensor& packed, bool relu) {
  return forward("rnn_cell", rnn_cell_kind(relu), input, h0, w_ih, w_hh, b_ih, b_hh, packed, false)
      .h;
}

Tensor rnn_cell(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                const OptionalTensor& b_ih, const OptionalTensor& b_hh, bool relu) {
  return rnn_cell_forward(input, h0, w_ih, w_hh, b_ih, b_hh, {}, relu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_cell_backward(
    const OptionalTensor& grad_h, const Tensor& input, const Tensor& h0, const Tensor& w_ih,
    const Tensor& w_hh, const Tensor& h, bool relu, int64_t needs) {
  const StepGradients d =
      backward("rnn_cell_backward", rnn_cell_kind(relu), grad_h, input, h0, w_ih, w_hh, h, needs);
  return {d.input, d.h0, d.w_ih, d.w_hh, d.b_ih};
}

}  // namespace seqkern
