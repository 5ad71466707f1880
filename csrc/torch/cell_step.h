// What the ops of one step share in the torch layer, of cells and of sequences of one step: checks,
// kept copies of weights, and the choice of kernels.
#pragma once

#include "torch/recurrent.h"

namespace seqkern {

// The tensors of a cell's op, checked and contiguous: G rows of each weight per unit.
struct CellTensors {
  DType dtype;
  int64_t G, B, I, H;
  Tensor x, h, w_ih, w_hh;
  OptionalTensor c;

  CellTensors(std::string_view op, int64_t G, const Tensor& input, const Tensor& h0,
              const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh)
      : dtype(float_dtype(input, op, "input")), G(G) {
    check(input.dim() == 2, op, ": input must be [B, I], got ", describe(input));
    check(w_ih.dim() == 2 && w_ih.size(0) >= G && w_ih.size(0) % G == 0, op, ": w_ih must be [",
          rows_of_gates(G), ", I], got ", describe(w_ih));
    B = input.size(0), I = input.size(1), H = w_ih.size(0) / G;
    const Checker checked{op, input};
    x = checked(input, "input", {B, I});
    h = checked(h0, "h", {B, H});
    c = checked(c0, "c", {B, H});
    this->w_ih = checked(w_ih, "w_ih", {G * H, I});
    this->w_hh = checked(w_hh, "w_hh", {G * H, H});
  }
};

// Which gradients of a step are wanted, but for c0's, which costs nothing.
struct StepWanted {
  bool input, h0, w_ih, w_hh, b_ih, b_hh;
};

struct StepGradients {
  Tensor input, h0, w_ih, w_hh, b_ih, b_hh;
};

// The products of a step's backward, from the gradients at its products with x, `dgates` [B, G H],
// and with h, `du`, which only the GRU has apart, as it has what h0 gets past the gates.
inline StepGradients step_gradients(const CellTensors& cell, const StepWanted& wanted,
                                    const Tensor& dgates, const OptionalTensor& du,
                                    const OptionalTensor& past) {
  const auto [B, I, H] = std::tuple(cell.B, cell.I, cell.H);
  const Tensor& recurrent = du ? *du : dgates;
  const auto none = [&] { return nothing(cell.x); };
  StepGradients d{.input = wanted.input ? mm(dgates, cell.w_ih, {B, I}) : none(),
                  .h0 = wanted.h0 ? mm(recurrent, cell.w_hh, {B, H}) : none(),
                  .w_ih = none(),
                  .w_hh = none(),
                  .b_ih = none(),
                  .b_hh = none()};
  if (wanted.h0 && past) d.h0 = torch::stable::subtract(d.h0, *past, -1.0);
#if defined(SEQKERN_BACKEND_CPU)
  if (wanted.w_ih && wanted.w_hh && has_rows_for_weight_gradients(dgates)) {
    const int64_t G = cell.G;
    const auto fresh = [&](bool is_wanted, std::initializer_list<int64_t> size) {
      return is_wanted ? empty_on(cell.x, Sizes(size.begin(), size.size()), cell.x.scalar_type())
                       : none();
    };
    d.w_ih = fresh(true, {G * H, I}), d.w_hh = fresh(true, {G * H, H});
    d.b_ih = fresh(wanted.b_ih, {G * H}), d.b_hh = fresh(du && wanted.b_hh, {G * H});
    const Tensor* sum = wanted.b_ih ? &d.b_ih : nullptr;
    const RightSide x{.b = cell.x, .out = d.w_ih, .edge = {}};
    const RightSide h{.b = cell.h, .out = d.w_hh, .edge = {}};
    if (du) {
      weight_gradients(dgates, {x}, sum, false);
      weight_gradients(*du, {h}, wanted.b_hh ? &d.b_hh : nullptr, false);
    } else {
      weight_gradients(dgates, {x, h}, sum, false);
    }
    return d;
  }
#endif
  const int64_t rows[] = {0};
  if (wanted.w_ih) d.w_ih = transposed_mm(dgates, cell.x);
  if (wanted.w_hh) d.w_hh = transposed_mm(recurrent, cell.h);
  if (wanted.b_ih) d.b_ih = torch::stable::sum(dgates, Sizes(rows, 1));
  if (du && wanted.b_hh) d.b_hh = torch::stable::sum(*du, Sizes(rows, 1));
  return d;
}

#if defined(SEQKERN_BACKEND_CPU)
// A copy of both weights of a step in the layout of its kernel, which the caller keeps: a uint8
// tensor of this and the copy.
struct alignas(64) PackedWeights {
  int64_t isa;  // whose layout it is
  int64_t dtype;
  int64_t G, I, H;
  int64_t members;
};

// What cell_pack made of weights of these sizes; null for none.
inline const PackedWeights* packed_weights(std::string_view op, const OptionalTensor& packed,
                                           const CellTensors& cell) {
  if (!packed) return nullptr;
  const bool is_blob = packed->scalar_type() == ScalarType::Byte && packed->dim() == 1 &&
                       packed->is_cpu() && packed->is_contiguous() &&
                       packed->numel() >= static_cast<int64_t>(sizeof(PackedWeights));
  check(is_blob, op, ": packed must be the result of cell_pack, got ", describe(*packed));
  const auto* kept = static_cast<const PackedWeights*>(packed->const_data_ptr());
  check(kept->isa == static_cast<int64_t>(cpu::active_isa()) &&
            kept->dtype == static_cast<int64_t>(cell.dtype) && kept->G == cell.G &&
            kept->I == cell.I && kept->H == cell.H,
        op, ": packed must be of weights ", describe(cell.w_ih), " and ", describe(cell.w_hh),
        " on this processor, got one of ", kept->G, " gates, input width ", kept->I, ", H ",
        kept->H);
  const int64_t bytes = Backend::workspace_bytes(cpu::CellStepPackArgs{.dtype = cell.dtype,
                                                                       .G = cell.G,
                                                                       .I = cell.I,
                                                                       .H = cell.H,
                                                                       .w_ih = nullptr,
                                                                       .w_hh = nullptr,
                                                                       .members = kept->members,
                                                                       .packed = nullptr});
  check(packed->numel() == static_cast<int64_t>(sizeof(PackedWeights)) + bytes, op,
        ": packed must be the result of cell_pack, whole, got ", describe(*packed));
  return kept;
}

inline cpu::CellStepInputs step_inputs(const CellTensors& cell, cpu::StepCell kind,
                                       const OptionalTensor& b_ih = {},
                                       const OptionalTensor& b_hh = {}) {
  return {.dtype = cell.dtype,
          .cell = kind,
          .B = cell.B,
          .I = cell.I,
          .H = cell.H,
          .x = cell.x.const_data_ptr(),
          .h0 = cell.h.const_data_ptr(),
          .c0 = data(cell.c),
          .w_ih = cell.w_ih.const_data_ptr(),
          .w_hh = cell.w_hh.const_data_ptr(),
          .b_ih = data(b_ih),
          .b_hh = data(b_hh)};
}

// One step with its products: weights read where they are, packed on the way, or found packed.
inline void run_step(const Tensor& like, const cpu::CellStepForwardArgs& step,
                     const PackedWeights* kept = nullptr) {
  const int64_t rows = kept ? Backend::step_kept_rows(step.in) : Backend::step_pack_rows(step.in);
  if (step.in.B < rows) return Backend::run(step);
  cpu::CellStepPackedArgs args{.step = step,
                               .packed = kept ? kept + 1 : nullptr,
                               .packed_members = kept ? kept->members : 0,
                               .workspace = nullptr};
  const Scratch scratch(like, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Backend::run(args);
}

// The gradient of a state after one step, as its backward reads it: that of the output [1, B, H]
// and that of the last state [B, H], either of which may be absent.
inline OptionalTensor step_gradient(const OptionalTensor& output, const OptionalTensor& last) {
  OptionalTensor first;
  if (output) first = torch::stable::contiguous(entry_of(*output, 0));
  return sum_of(first, last);
}

// The whole backward of a step of few rows: `step` with all but its gradients, dc0 apart.
inline bool is_step_of_few_rows(const cpu::CellStepInputs& in) {
  return in.B > 0 && in.B < Backend::step_backward_pack_rows(in);
}
inline StepGradients run_step_backward(const Tensor& like, const StepWanted& wanted,
                                       cpu::CellStepBackwardArgs step) {
  const cpu::CellStepInputs& in = step.in;
  const int64_t G = gates_of(in.cell);
  const auto fresh = [&](bool is_wanted, std::initializer_list<int64_t> size) {
    return is_wanted ? empty_on(like, Sizes(size.begin(), size.size()), like.scalar_type())
                     : nothing(like);
  };
  const bool apart = in.cell == cpu::StepCell::kGru;
  const StepGradients d{.input = fresh(wanted.input, {in.B, in.I}),
                        .h0 = fresh(wanted.h0, {in.B, in.H}),
                        .w_ih = fresh(wanted.w_ih, {G * in.H, in.I}),
                        .w_hh = fresh(wanted.w_hh, {G * in.H, in.H}),
                        .b_ih = fresh(wanted.b_ih, {G * in.H}),
                        .b_hh = fresh(apart && wanted.b_hh, {G * in.H})};
  step.dx = mutable_data(d.input, wanted.input);
  step.dh0 = mutable_data(d.h0, wanted.h0);
  step.dw_ih = mutable_data(d.w_ih, wanted.w_ih);
  step.dw_hh = mutable_data(d.w_hh, wanted.w_hh);
  step.db_ih = mutable_data(d.b_ih, wanted.b_ih);
  step.db_hh = mutable_data(d.b_hh, apart && wanted.b_hh);
  const Scratch scratch(like, Backend::workspace_bytes(step));
  step.workspace = scratch.data();
  Backend::run(step);
  return d;
}

// The same for any number of rows.
inline StepGradients step_backward(const CellTensors& cell, const StepWanted& wanted,
                                   const cpu::CellStepBackwardArgs& step) {
  if (is_step_of_few_rows(step.in)) return run_step_backward(cell.x, wanted, step);
  // Rows of whole KB would fall into few sets of the caches that the products read them from.
  const int64_t width = cell.G * cell.H;
  const int64_t row = width + 64 / static_cast<int64_t>(cell.x.element_size());
  const bool apart = step.in.cell == cpu::StepCell::kGru;
  const ScratchTensor memory(cell.x, apart ? 2 : 1, cell.B, width, row);
  const Tensor dgates = entry_of(memory.tensor(), 0);
  OptionalTensor du, past;
  if (apart) {
    du = entry_of(memory.tensor(), 1);
    past = empty_on(cell.x, cell.h.sizes(), cell.x.scalar_type());
  }
  if (cell.B > 0) {
    Backend::run(cpu::CellStepGatesArgs{.step = step,
                                        .dgates = dgates.mutable_data_ptr(),
                                        .du = apart ? du->mutable_data_ptr() : nullptr,
                                        .row = row,
                                        .past = apart ? past->mutable_data_ptr() : nullptr});
  }
  return step_gradients(cell, wanted, dgates, du, past);
}
#endif

}  // namespace seqkern
