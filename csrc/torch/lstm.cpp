// ops::lstm and its backward, one direction of one layer: check, allocate, run.
#include "ops/lstm.h"

#include "torch/lstm.h"
#include "torch/ops_recurrent.h"
#include "torch/tokens.h"

namespace seqkern {
namespace {

// The contract's inputs, and the tensors made for them (kept alive as long as the pointers).
struct Inputs {
  LstmInputs args;
  Tensor input;
  Tensor w_ih;
  Tensor w_hh;
  OptionalTensor b_ih;
  OptionalTensor b_hh;
  OptionalTensor bias;  // their sum, where that is wanted
  OptionalTensor w_hr;
  OptionalTensor h0;
  OptionalTensor c0;
  OptionalTensor lengths;
  std::optional<Tokens> tokens;  // with lengths that the host can read
};

Inputs prepare(std::string_view op, const Tensor& input, const OptionalTensor& h0,
               const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
               const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
               const OptionalTensor& lengths, bool reverse) {
  const DType dtype = float_dtype(input, op, "input");
  check(input.dim() == 3, op, ": input must be [T, B, I], got ", describe(input));
  const int64_t T = input.size(0), B = input.size(1), I = input.size(2);
  check(T >= 1, op, ": input must have at least one step, got ", describe(input));
  check(w_ih.dim() == 2 && w_ih.size(0) >= 4 && w_ih.size(0) % 4 == 0, op,
        ": w_ih must be [4 H, I], got ", describe(w_ih));
  const int64_t H = w_ih.size(0) / 4;
  check(!w_hr || (w_hr->dim() == 2 && w_hr->size(0) >= 1), op, ": w_hr must be [P, H], got ",
        w_hr ? describe(*w_hr) : "");
  const int64_t P = w_hr ? w_hr->size(0) : H;
  const Checker checked{op, input};
  Inputs in{.args = {},
            .input = input.is_contiguous() ? input : torch::stable::contiguous(input),
            .w_ih = checked(w_ih, "w_ih", {4 * H, I}),
            .w_hh = checked(w_hh, "w_hh", {4 * H, P}),
            .b_ih = checked(b_ih, "b_ih", {4 * H}),
            .b_hh = checked(b_hh, "b_hh", {4 * H}),
            .bias = {},
            .w_hr = checked(w_hr, "w_hr", {P, H}),
            .h0 = checked(h0, "h0", {B, P}),
            .c0 = checked(c0, "c0", {B, H}),
            .lengths = checked.lengths(lengths, B, T),
            .tokens = {}};
  if (Backend::kHostReadable && in.lengths) {
    in.tokens.emplace(static_cast<const int64_t*>(in.lengths->const_data_ptr()), T, B);
  }
  in.args = {.r = {.dtype = dtype,
                   .T = T,
                   .B = B,
                   .H = H,
                   .P = P,
                   .w_hh = in.w_hh.const_data_ptr(),
                   .b_hh = nullptr,
                   .h0 = data(in.h0),
                   .lengths = static_cast<const int64_t*>(data(in.lengths)),
                   .reverse = reverse,
                   .first_token = in.tokens ? in.tokens->first.data() : nullptr},
             .w_hr = data(in.w_hr),
             .c0 = data(in.c0)};
  return in;
}

#if defined(SEQKERN_BACKEND_CPU)
// A sequence of one step, as in generation: no product over time, so no weight worth packing.
bool is_step(const Inputs& in) {
  const RecurrentInputs& r = in.args.r;
  return r.T == 1 && r.B > 0 && r.B <= Backend::kStepRows && !in.w_hr && !in.lengths;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(const Inputs& in, bool save_gates,
                                                        bool save_cells) {
  const RecurrentInputs& r = in.args.r;
  const auto fresh = [&](bool wanted, std::initializer_list<int64_t> size) {
    return wanted ? empty_on(in.input, Sizes(size.begin(), size.size()), in.input.scalar_type())
                  : nothing(in.input);
  };
  const Tensor output = fresh(true, {1, r.B, r.H}), h_n = fresh(true, {r.B, r.H});
  const Tensor c = fresh(save_cells, {1, r.B, r.H}), c_n = fresh(true, {r.B, r.H});
  const Tensor gates = fresh(save_gates, {1, r.B, 4 * r.H});
  Backend::run(cpu::LstmStepForwardArgs{.in = {.dtype = r.dtype,
                                               .B = r.B,
                                               .I = in.input.size(2),
                                               .H = r.H,
                                               .x = in.input.const_data_ptr(),
                                               .h0 = r.h0,
                                               .c0 = in.args.c0,
                                               .w_ih = in.w_ih.const_data_ptr(),
                                               .w_hh = r.w_hh,
                                               .b_ih = data(in.b_ih),
                                               .b_hh = data(in.b_hh)},
                                        .gates = mutable_data(gates, save_gates),
                                        .h = mutable_data(output),
                                        .c = mutable_data(c_n)});
  const size_t bytes = static_cast<size_t>(h_n.numel()) * h_n.element_size();
  std::memcpy(h_n.mutable_data_ptr(), output.const_data_ptr(), bytes);
  if (save_cells) std::memcpy(c.mutable_data_ptr(), c_n.const_data_ptr(), bytes);
  return {output, h_n, c_n, c, gates};
}
#endif

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, const OptionalTensor& lengths, bool reverse, bool save_gates,
    bool save_cells) {
  [[maybe_unused]] const Backend::Guard guard(input);
  Inputs in = prepare("lstm", input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reverse);
#if defined(SEQKERN_BACKEND_CPU)
  if (is_step(in)) return step(in, save_gates, save_cells);
#endif
  in.bias = bias_sum(in.b_ih, in.b_hh);
  in.args.r.b_hh = data(in.bias);
  const RecurrentInputs& r = in.args.r;
  const ScalarType type = input.scalar_type();
  // The gates take the place of their inputs: a buffer of 4 H fewer to fetch and to write. Without
  // padding they fill the first rows of it, and the rest is never touched.
  const Tensor gates_x = empty_on(input, Sizes({r.T, r.B, 4 * r.H}), type);
  Backend::before_first_write(gates_x);
  const Tensor x = in.tokens ? in.tokens->gather(in.input) : rows_2d(in.input);
  mm_into(x, torch::stable::transpose(in.w_ih, 0, 1), narrow(rows_2d(gates_x), 0, 0, x.size(0)));
  const int64_t h_size[] = {r.T, r.B, r.P}, c_size[] = {r.T, r.B, r.H};
  const Tensor output = empty_on(input, Sizes(h_size, 3), type);
  const Tensor c = save_cells ? empty_on(input, Sizes(c_size, 3), type) : nothing(input);
  Backend::before_first_write(output);
  Backend::before_first_write(c);
  const Tensor h_n = empty_on(input, Sizes(h_size + 1, 2), type);
  const Tensor c_n = empty_on(input, Sizes(c_size + 1, 2), type);
  if (r.B > 0) {
    LstmForwardArgs args{.in = in.args,
                         .gates_x = gates_x.const_data_ptr(),
                         .gates_x_strides = sequence_strides(gates_x),
                         .gates = mutable_data(gates_x, save_gates),
                         .c = mutable_data(c, save_cells),
                         .h = mutable_data(output),
                         .h_strides = sequence_strides(output),
                         .h_n = mutable_data(h_n),
                         .c_n = mutable_data(c_n),
                         .workspace = nullptr};
    const auto scratch = workspace(input, Backend::workspace_bytes(args));
    if (scratch) args.workspace = scratch->mutable_data_ptr();
    Backend::run(args);
  }
  return {output, h_n, c_n, c, save_gates ? gates_x : nothing(input)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
    const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& lengths, const Tensor& output,
    const Tensor& c, const Tensor& gates, bool activated, bool reverse, int64_t needs) {
  constexpr std::string_view kOp = "lstm_backward";
  [[maybe_unused]] const Backend::Guard guard(input);
  const Inputs in = prepare(kOp, input, h0, c0, w_ih, w_hh, {}, {}, w_hr, lengths, reverse);
  const RecurrentInputs& r = in.args.r;
  const auto [T, B, H, P] = std::tuple(r.T, r.B, r.H, r.P);
  const Checker checked{kOp, input};
  const Tensor kept_h = checked(output, "output", {T, B, P});
  const Tensor kept_c = checked(c, "c", {T, B, H});
  Tensor kept_gates = checked(gates, "gates", {T, B, 4 * H});
  if (in.tokens && !activated) kept_gates = in.tokens->gather(kept_gates);
  const auto dh = sequence_gradient(grad_output, checked, "grad_output", {T, B, P});
  const auto dc = checked(grad_c, "grad_c", {T, B, H});
  const auto dh_n = checked(grad_h_n, "grad_h_n", {B, P});
  const auto dc_n = checked(grad_c_n, "grad_c_n", {B, H});

  const ScalarType type = input.scalar_type();
  const auto fresh = [&](bool wanted, std::initializer_list<int64_t> size) {
    const Tensor t =
        wanted ? empty_on(input, Sizes(size.begin(), size.size()), type) : nothing(input);
    Backend::before_first_write(t);
    return t;
  };
  const bool project = w_hr.has_value();
  const bool first_elsewhere = h0 && lengths && !in.tokens && reverse && (needs & kWhh);
  const Tensor dgates = fresh(true, {T, B, 4 * H});
  const Tensor dgates_0 = fresh(first_elsewhere, {B, 4 * H});
  const Tensor dh0 = fresh(needs & kH0, {B, P});
  const Tensor dc0 = fresh(needs & kC0, {B, H});
  const Tensor dh_total = fresh(project, {T, B, P});
  const Tensor m = fresh(project, {T, B, H});
  if (B > 0) {
    LstmBackwardArgs args{.in = in.args,
                          .gates = kept_gates.const_data_ptr(),
                          .activated = activated,
                          .c = kept_c.const_data_ptr(),
                          .dh = data(dh),
                          .dh_strides = dh ? sequence_strides(*dh) : SequenceStrides{},
                          .dc = data(dc),
                          .dh_n = data(dh_n),
                          .dc_n = data(dc_n),
                          .dgates = mutable_data(dgates),
                          .dgates_0 = mutable_data(dgates_0, first_elsewhere),
                          .dh0 = mutable_data(dh0, needs & kH0),
                          .dc0 = mutable_data(dc0, needs & kC0),
                          .dh_total = mutable_data(dh_total, project),
                          .m = mutable_data(m, project),
                          .workspace = nullptr};
    const auto scratch = workspace(input, Backend::workspace_bytes(args));
    if (scratch) args.workspace = scratch->mutable_data_ptr();
    Backend::run(args);
  }
  const int64_t rows_of_tokens = in.tokens ? in.tokens->count : T * B;
  const Tensor flat = narrow(rows_2d(dgates), 0, 0, rows_of_tokens);  // [T B or tokens, 4 H]
  const auto input_gradient = [&] {
    if (in.tokens) return in.tokens->scatter(mm(flat, in.w_ih, {flat.size(0), in.w_ih.size(1)}));
    return mm(flat, in.w_ih, {T, B, in.w_ih.size(1)});
  };
  const auto w_ih_gradient = [&] {
    if (in.tokens) return transposed_mm(flat, in.tokens->gather(in.input));
    return transposed_mm(flat,
                         rows_2d(in.lengths ? without_padding(in.input, *in.lengths) : in.input));
  };
  const auto w_hh_gradient = [&] {
    if (in.tokens) return transposed_mm(flat, in.tokens->states_before(kept_h, in.h0, reverse));
    return recurrent_weight_gradient(dgates, kept_h, in.h0,
                                     first_elsewhere ? OptionalTensor(dgates_0) : OptionalTensor(),
                                     reverse);
  };
  const int64_t rows[] = {0};
  return {
      needs & kInput ? input_gradient() : nothing(input),
      dh0,
      dc0,
      needs & kWih ? w_ih_gradient() : nothing(input),
      needs & kWhh ? w_hh_gradient() : nothing(input),
      needs & kBias ? torch::stable::sum(flat, Sizes(rows, 1)) : nothing(input),
      project && (needs & kWhr) ? transposed_mm(rows_2d(dh_total), rows_2d(m)) : nothing(input),
  };
}

}  // namespace seqkern
