// ops::lstm_cell and its backward, one step: check, allocate, run.
#include <cstring>

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

#if defined(SEQKERN_BACKEND_CPU)
// What lstm_cell_pack made of weights of these sizes; null for none.
const PackedWeights* packed_weights(std::string_view op, const OptionalTensor& packed,
                                    const Cell& cell) {
  if (!packed) return nullptr;
  const bool is_blob = packed->scalar_type() == ScalarType::Byte && packed->dim() == 1 &&
                       packed->is_cpu() && packed->is_contiguous() &&
                       packed->numel() >= static_cast<int64_t>(sizeof(PackedWeights));
  check(is_blob, op, ": packed must be the result of lstm_cell_pack, got ", describe(*packed));
  const auto* kept = static_cast<const PackedWeights*>(packed->const_data_ptr());
  check(kept->isa == static_cast<int64_t>(cpu::active_isa()) &&
            kept->dtype == static_cast<int64_t>(cell.dtype) && kept->I == cell.I &&
            kept->H == cell.H,
        op, ": packed must be of weights ", describe(cell.w_ih), " and ", describe(cell.w_hh),
        " on this processor, got one of input width ", kept->I, ", H ", kept->H);
  const int64_t bytes = Backend::workspace_bytes(cpu::LstmStepPackArgs{.dtype = cell.dtype,
                                                                       .I = cell.I,
                                                                       .H = cell.H,
                                                                       .w_ih = nullptr,
                                                                       .w_hh = nullptr,
                                                                       .members = kept->members,
                                                                       .packed = nullptr});
  check(packed->numel() == static_cast<int64_t>(sizeof(PackedWeights)) + bytes, op,
        ": packed must be the result of lstm_cell_pack, whole, got ", describe(*packed));
  return kept;
}
#endif

}  // namespace

Tensor lstm_cell_pack(const Tensor& w_ih, const Tensor& w_hh) {
  constexpr std::string_view kOp = "lstm_cell_pack";
  [[maybe_unused]] const Backend::Guard guard(w_ih);
  const DType dtype = float_dtype(w_ih, kOp, "w_ih");
  check(w_ih.dim() == 2 && w_ih.size(0) >= 4 && w_ih.size(0) % 4 == 0, kOp,
        ": w_ih must be [4 H, I], got ", describe(w_ih));
  const int64_t I = w_ih.size(1), H = w_ih.size(0) / 4;
  const Checker checked{kOp, w_ih};
  const Tensor first = checked(w_ih, "w_ih", {4 * H, I});
  const Tensor second = checked(w_hh, "w_hh", {4 * H, H});
#if defined(SEQKERN_BACKEND_CPU)
  cpu::LstmStepPackArgs args{.dtype = dtype,
                             .I = I,
                             .H = H,
                             .w_ih = first.const_data_ptr(),
                             .w_hh = second.const_data_ptr(),
                             .members = torch::stable::get_num_threads(),
                             .packed = nullptr};
  constexpr auto kHead = static_cast<int64_t>(sizeof(PackedWeights));
  const int64_t size[] = {kHead + Backend::workspace_bytes(args)};
  const Tensor packed = empty_on(w_ih, Sizes(size, 1), ScalarType::Byte);
  std::memset(packed.mutable_data_ptr(), 0, kHead);  // also what lies between its members
  auto* kept = static_cast<PackedWeights*>(packed.mutable_data_ptr());
  *kept = {.isa = static_cast<int64_t>(cpu::active_isa()),
           .dtype = static_cast<int64_t>(dtype),
           .I = I,
           .H = H,
           .members = args.members};
  args.packed = kept + 1;
  Backend::run(args);
  return packed;
#else
  (void)dtype;
  return empty_on(w_ih, {0}, ScalarType::Byte);  // kernels there read weights where they are
#endif
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(const Tensor& input, const Tensor& h0,
                                                     const Tensor& c0, const Tensor& w_ih,
                                                     const Tensor& w_hh, const OptionalTensor& b_ih,
                                                     const OptionalTensor& b_hh,
                                                     [[maybe_unused]] const OptionalTensor& packed,
                                                     bool save_gates) {
  constexpr std::string_view kOp = "lstm_cell";
  [[maybe_unused]] const Backend::Guard guard(input);
  const Cell cell(kOp, input, h0, c0, w_ih, w_hh);
  const auto [B, H] = std::pair(cell.B, cell.H);
  const Checker checked{kOp, input};
  const auto b_x = checked(b_ih, "b_ih", {4 * H}), b_h = checked(b_hh, "b_hh", {4 * H});
  const Tensor h1 = empty_on(input, cell.h.sizes(), input.scalar_type());
  const Tensor c1 = empty_on(input, cell.c.sizes(), input.scalar_type());
#if defined(SEQKERN_BACKEND_CPU)
  const PackedWeights* kept = packed_weights(kOp, packed, cell);
  const Tensor gates =
      save_gates ? empty_on(input, Sizes({B, 4 * H}), input.scalar_type()) : nothing(input);
  if (B > 0) {
    run_step(input,
             {.in = cell.step(b_x, b_h),
              .gates = mutable_data(gates, save_gates),
              .h = mutable_data(h1),
              .c = mutable_data(c1)},
             kept);
  }
  return {h1, c1, gates};
#else
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
#endif
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& h0,
                                             const Tensor& c0, const Tensor& w_ih,
                                             const Tensor& w_hh, const OptionalTensor& b_ih,
                                             const OptionalTensor& b_hh, bool save_gates) {
  return lstm_cell_forward(input, h0, c0, w_ih, w_hh, b_ih, b_hh, {}, save_gates);
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
  [[maybe_unused]] const auto fresh = [&](int64_t bit, std::initializer_list<int64_t> size) {
    return needs & bit ? empty_on(input, Sizes(size.begin(), size.size()), input.scalar_type())
                       : nothing(input);
  };
#if defined(SEQKERN_BACKEND_CPU)
  if (B > 0 && B < Backend::step_backward_pack_rows(cell.step({}, {}))) {
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
  const int64_t line = 64 / static_cast<int64_t>(input.element_size());
  const int64_t dgates_row = 4 * H + (Backend::kRowsApart ? line : 0);
  const ScratchTensor dgates_memory(input, 1, B, 4 * H, dgates_row);
  const Tensor dgates = torch::stable::select(dgates_memory.tensor(), 0, 0);
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
                                      .dgates_row = dgates_row,
                                      .dc0 = mutable_data(dc0)});
  }
  const Tensor dx = needs & kInput ? mm(dgates, cell.w_ih, {B, I}) : nothing(input);
  const Tensor dh0 = needs & kH0 ? mm(dgates, cell.w_hh, {B, H}) : nothing(input);
#if defined(SEQKERN_BACKEND_CPU)
  if ((needs & kWih) && (needs & kWhh) && has_rows_for_weight_gradients(dgates)) {
    const Tensor dw_ih = fresh(kWih, {4 * H, I}), dw_hh = fresh(kWhh, {4 * H, H});
    const Tensor db = fresh(kBias, {4 * H});
    weight_gradients(
        dgates, {{.b = cell.x, .out = dw_ih, .edge = {}}, {.b = cell.h, .out = dw_hh, .edge = {}}},
        needs & kBias ? &db : nullptr, false);
    return {dx, dh0, dc0, dw_ih, dw_hh, db};
  }
#endif
  const int64_t rows[] = {0};
  return {dx,
          dh0,
          dc0,
          needs & kWih ? transposed_mm(dgates, cell.x) : nothing(input),
          needs & kWhh ? transposed_mm(dgates, cell.h) : nothing(input),
          needs & kBias ? torch::stable::sum(dgates, Sizes(rows, 1)) : nothing(input)};
}

}  // namespace seqkern
