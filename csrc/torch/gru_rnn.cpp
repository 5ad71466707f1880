// ops::gru, ops::rnn and their backwards, one direction of one layer: check, allocate, run.
#include "torch/gru_rnn.h"

#include <cstring>

#include "torch/ops_recurrent.h"
#include "torch/sequence_input.h"

namespace seqkern {
namespace {

// The contract's inputs, and the tensors made for them (kept alive as long as the pointers).
struct Inputs : SequenceInput {
  RecurrentInputs args;
  Tensor w_hh;
  OptionalTensor b_ih;
  OptionalTensor b_hh;
  OptionalTensor h0;

#if defined(SEQKERN_BACKEND_CPU)
  // A sequence of one step, as in generation: no product over time, so no weight worth packing.
  bool is_step() const { return T == 1 && B > 0 && !lengths && !ids; }
  cpu::CellStepInputs step(HiddenCell cell) const {
    return {.dtype = dtype,
            .cell = step_cell(cell),
            .B = B,
            .I = I,
            .H = H,
            .x = data(x),
            .h0 = data(h0),
            .c0 = nullptr,
            .w_ih = w_ih.const_data_ptr(),
            .w_hh = w_hh.const_data_ptr(),
            .b_ih = data(b_ih),
            .b_hh = data(b_hh)};
  }
#endif
};

Inputs prepare(std::string_view op, HiddenCell cell, const Tensor& input, const OptionalTensor& h0,
               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
               const OptionalTensor& b_hh, const OptionalTensor& lengths, bool reverse) {
  const int64_t G = gates_of(cell);
  Inputs in{sequence_input(op, input, w_ih, lengths, G), {}, w_hh, {}, {}, {}};
  const auto [T, B, H] = std::tuple(in.T, in.B, in.H);
  const Checker checked{op, in.w_ih};
  in.w_hh = checked(w_hh, "w_hh", {G * H, H});
  in.b_ih = checked(b_ih, "b_ih", {G * H});
  in.b_hh = checked(b_hh, "b_hh", {G * H});
  in.h0 = checked(h0, "h0", {B, H});
  in.args = {.dtype = in.dtype,
             .T = T,
             .B = B,
             .H = H,
             .P = H,
             .w_hh = in.w_hh.const_data_ptr(),
             .b_hh = data(in.b_hh),
             .h0 = data(in.h0),
             .lengths = static_cast<const int64_t*>(data(in.lengths)),
             .reverse = reverse,
             .first_token = in.tokens ? in.tokens->first.data() : nullptr};
  return in;
}

struct Result {
  Tensor output, h_n, gates, u_n;
};

Result forward(std::string_view op, HiddenCell cell, const Tensor& input, const OptionalTensor& h0,
               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
               const OptionalTensor& b_hh, const OptionalTensor& lengths, bool reverse,
               bool save_gates) {
  [[maybe_unused]] const Backend::Guard guard(input);
  const Inputs in = prepare(op, cell, input, h0, w_ih, w_hh, b_ih, b_hh, lengths, reverse);
  const RecurrentInputs& r = in.args;
  const Tensor& like = in.w_hh;
  const ScalarType type = like.scalar_type();
  const auto fresh = [&](std::initializer_list<int64_t> size) {
    const Tensor t = empty_on(like, Sizes(size.begin(), size.size()), type);
    Backend::before_first_write(t);
    return t;
  };
  // What is made of gates_x takes its place: a buffer fewer to fetch and to write. Without padding
  // the tokens fill the first rows of it, and are not where an RNN's output is.
  const bool in_place = cell != HiddenCell::kGru && !in.tokens;
  const int64_t gates_width = gates_of(cell) * r.H;
#if defined(SEQKERN_BACKEND_CPU)
  if (in.is_step()) {
    const Result y{
        .output = fresh({1, r.B, r.H}),
        .h_n = fresh({r.B, r.H}),
        .gates = save_gates ? fresh({1, r.B, gates_width}) : nothing(like),
        .u_n = save_gates ? fresh({1, r.B, r.H}) : nothing(like),
    };
    run_step(like, {.in = in.step(cell),
                    .gates = mutable_data(y.gates, save_gates),
                    .u_n = mutable_data(y.u_n, save_gates),
                    .h = mutable_data(y.output),
                    .c = nullptr});
    std::memcpy(y.h_n.mutable_data_ptr(), y.output.const_data_ptr(),
                static_cast<size_t>(y.h_n.numel()) * y.h_n.element_size());
    return y;
  }
#endif
  const Tensor gates_x =
      in_place ? fresh({r.T, r.B, gates_width}) : empty_activations(like, r.T, r.B, gates_width);
  const Tensor output = in_place ? gates_x : fresh({r.T, r.B, r.H});
  in.product_into(narrow(rows_2d(gates_x), 0, 0, in.count()));
  Result result{.output = output,
                .h_n = fresh({r.B, r.H}),
                .gates = save_gates ? gates_x : nothing(like),
                .u_n = save_gates ? fresh({r.T, r.B, r.H}) : nothing(like)};
  if (r.B == 0) return result;
  HiddenForwardArgs args{.r = in.args,
                         .cell = cell,
                         .b_ih = data(in.b_ih),
                         .gates_x = gates_x.const_data_ptr(),
                         .gates = save_gates ? gates_x.mutable_data_ptr() : nullptr,
                         .u_n = save_gates ? result.u_n.mutable_data_ptr() : nullptr,
                         .h = output.mutable_data_ptr(),
                         .h_n = result.h_n.mutable_data_ptr(),
                         .workspace = nullptr};
  const Scratch scratch(like, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Backend::run(args);
  return result;
}

// Rows from `first` on of `to` become `from`.
void copy_rows(const Tensor& to, int64_t first, const Tensor& from) {
  Tensor rows = seqkern::narrow(to, 0, first, from.size(0));
  torch::stable::copy_(rows, from);
}

// What an RNN has no use for is null.
struct Saved {
  const Tensor* gates;
  const Tensor* u_n;
  bool activated;
};

StepGradients backward(std::string_view op, HiddenCell cell, const OptionalTensor& grad_output,
                       const OptionalTensor& grad_h_n, const Tensor& input,
                       const OptionalTensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                       const OptionalTensor& lengths, const Tensor& output, const Saved& saved,
                       bool reverse, int64_t needs) {
  [[maybe_unused]] const Backend::Guard guard(input);
  const Inputs in = prepare(op, cell, input, h0, w_ih, w_hh, {}, {}, lengths, reverse);
  const RecurrentInputs& r = in.args;
  const bool gru = cell == HiddenCell::kGru;
  const int64_t T = r.T, B = r.B, H = r.H, G = gates_of(cell);
  const Checker checked{op, in.w_hh};
  const Tensor kept_h = checked(output, "output", {T, B, H});
  OptionalTensor gates, u_n;
  if (gru) {
    gates = checked(*saved.gates, "gates", {T, B, 3 * H});
    u_n = checked(*saved.u_n, "u_n", {T, B, H});
    if (in.tokens && !saved.activated) {
      gates = in.tokens->gather(*gates);
      u_n = in.tokens->gather(*u_n);
    }
  }
  const auto dh = sequence_gradient(grad_output, checked, "grad_output", {T, B, H});
  const auto dh_n = checked(grad_h_n, "grad_h_n", {B, H});

  const Tensor& like = in.w_hh;
  const ScalarType type = like.scalar_type();
#if defined(SEQKERN_BACKEND_CPU)
  if (in.is_step() && (saved.activated || !gru) && is_step_of_few_rows(in.step(cell))) {
    const auto dh_1 = step_gradient(dh, dh_n);
    StepGradients d = run_step_backward(like, step_wanted(needs),
                                        {.in = in.step(cell),
                                         .gates = data(gates),
                                         .u_n = data(u_n),
                                         .h = kept_h.const_data_ptr(),
                                         .dh = data(dh_1)});
    const int64_t size[] = {1, B, in.I};
    if (needs & kInput) d.input = torch::stable::view(d.input, Sizes(size, 3));
    return d;
  }
#endif
  const auto fresh = [&](bool wanted, std::initializer_list<int64_t> size) {
    const Tensor t =
        wanted ? empty_on(like, Sizes(size.begin(), size.size()), type) : nothing(like);
    Backend::before_first_write(t);
    return t;
  };
  const bool first_elsewhere = h0 && lengths && !in.tokens && reverse && (needs & kWhh);
  const Tensor dgates = fresh(true, {T, B, G * H});
  const Tensor du_n = fresh(gru, {T, B, H});
  const Tensor du_0 = fresh(first_elsewhere, {B, G * H});
  const Tensor dh0 = fresh(needs & kH0, {B, H});
  if (B > 0) {
    HiddenBackwardArgs args{.r = in.args,
                            .cell = cell,
                            .gates = data(gates),
                            .u_n = data(u_n),
                            .activated = saved.activated,
                            .h = kept_h.const_data_ptr(),
                            .dh = data(dh),
                            .dh_strides = dh ? sequence_strides(*dh) : SequenceStrides{},
                            .dh_n = data(dh_n),
                            .dgates = dgates.mutable_data_ptr(),
                            .du_n = mutable_data(du_n, gru),
                            .du_0 = mutable_data(du_0, first_elsewhere),
                            .dh0 = mutable_data(dh0, needs & kH0),
                            .workspace = nullptr};
    const Scratch scratch(like, Backend::workspace_bytes(args));
    args.workspace = scratch.data();
    Backend::run(args);
  }
  const auto tokens_of = [&](const Tensor& t) { return narrow(rows_2d(t), 0, 0, in.count()); };
  const Tensor flat = tokens_of(dgates);  // [T B or tokens, G H]
  const OptionalTensor first_h = needs & kWhh ? in.state_of_first_steps(in.h0) : OptionalTensor();
  // The rows [first, first + count) of dw_hh, from the same columns of du: `part`.
  const auto w_hh_rows = [&](const Tensor& part, int64_t first, int64_t count) {
    OptionalTensor part_0;
    if (first_elsewhere) part_0 = seqkern::narrow(du_0, 1, first, count);
    return recurrent_weight_gradient(part, kept_h, first_h, part_0, reverse);
  };
  const auto w_hh_gradient = [&] {
    if (!gru && !in.tokens) return w_hh_rows(dgates, 0, H);
    OptionalTensor before;
    if (in.tokens) before = in.tokens->states_before(kept_h, in.h0, reverse);
    if (!gru) return transposed_mm(flat, *before);
    const Tensor dw = fresh(true, {3 * H, H});
    const auto columns = [&](const Tensor& t, int64_t dim) {  // of r and z
      return seqkern::narrow(t, dim, 0, 2 * H);
    };
    copy_rows(dw, 0,
              before ? transposed_mm(columns(flat, 1), *before)
                     : w_hh_rows(columns(dgates, 2), 0, 2 * H));
    copy_rows(dw, 2 * H,
              before ? transposed_mm(tokens_of(du_n), *before) : w_hh_rows(du_n, 2 * H, H));
    return dw;
  };
  const int64_t rows[] = {0};
  const auto sum = [&](const Tensor& t) { return torch::stable::sum(t, Sizes(rows, 1)); };
  StepGradients d{.input = needs & kInput && in.x ? in.gradient(flat) : nothing(like),
                  .h0 = dh0,
                  .w_ih = needs & kWih ? in.weight_gradient(flat) : nothing(like),
                  .w_hh = needs & kWhh ? w_hh_gradient() : nothing(like),
                  .b_ih = needs & kBih ? sum(flat) : nothing(like),
                  .b_hh = nothing(like)};
  if (gru && (needs & kBhh)) {  // as b_ih's but in gate n
    const Tensor same = needs & kBih ? d.b_ih : sum(flat);
    d.b_hh = fresh(true, {3 * H});
    copy_rows(d.b_hh, 0, seqkern::narrow(same, 0, 0, 2 * H));
    copy_rows(d.b_hh, 2 * H, sum(tokens_of(du_n)));
  }
  return d;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gru(const Tensor& input, const OptionalTensor& h0,
                                               const Tensor& w_ih, const Tensor& w_hh,
                                               const OptionalTensor& b_ih,
                                               const OptionalTensor& b_hh,
                                               const OptionalTensor& lengths, bool reverse,
                                               bool save_gates) {
  const Result y = forward("gru", HiddenCell::kGru, input, h0, w_ih, w_hh, b_ih, b_hh, lengths,
                           reverse, save_gates);
  return {y.output, y.h_n, y.gates, y.u_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
    const OptionalTensor& h0, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& lengths,
    const Tensor& output, const Tensor& gates, const Tensor& u_n, bool activated, bool reverse,
    int64_t needs) {
  const StepGradients d =
      backward("gru_backward", HiddenCell::kGru, grad_output, grad_h_n, input, h0, w_ih, w_hh,
               lengths, output, {&gates, &u_n, activated}, reverse, needs);
  return {d.input, d.h0, d.w_ih, d.w_hh, d.b_ih, d.b_hh};
}

std::tuple<Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& h0, const Tensor& w_ih,
                               const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& lengths,
                               bool reverse, bool relu) {
  const Result y = forward("rnn", rnn_cell_kind(relu), input, h0, w_ih, w_hh, b_ih, b_hh, lengths,
                           reverse, false);
  return {y.output, y.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
    const OptionalTensor& h0, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& lengths,
    const Tensor& output, bool reverse, bool relu, int64_t needs) {
  const StepGradients d = backward("rnn_backward", rnn_cell_kind(relu), grad_output, grad_h_n,
                                   input, h0, w_ih, w_hh, lengths, output, {}, reverse, needs);
  return {d.input, d.h0, d.w_ih, d.w_hh, d.b_ih};
}

}  // namespace seqkern
