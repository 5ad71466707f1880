// ops::lstm, one direction of one layer: check, allocate, run.
#include "ops/lstm.h"

#include "torch/lstm_inputs.h"
#include "torch/ops_recurrent.h"

namespace seqkern {
namespace {

#if defined(SEQKERN_BACKEND_CPU)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(const LstmTensors& in, bool save_gates,
                                                        bool save_cells) {
  const RecurrentInputs& r = in.args.r;
  const auto fresh = [&](bool wanted, std::initializer_list<int64_t> size) {
    return wanted ? empty_on(in.w_hh, Sizes(size.begin(), size.size()), in.w_hh.scalar_type())
                  : nothing(in.w_hh);
  };
  const Tensor output = fresh(true, {1, r.B, r.H}), h_n = fresh(true, {r.B, r.H});
  const Tensor c = fresh(save_cells, {1, r.B, r.H}), c_n = fresh(true, {r.B, r.H});
  const Tensor gates = fresh(save_gates, {1, r.B, 4 * r.H});
  run_step(in.w_hh, {.in = in.step(),
                     .gates = mutable_data(gates, save_gates),
                     .u_n = nullptr,
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
  LstmTensors in =
      lstm_tensors("lstm", input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reverse);
#if defined(SEQKERN_BACKEND_CPU)
  if (in.is_step()) return step(in, save_gates, save_cells);
#endif
  in.bias = sum_of(in.b_ih, in.b_hh);
  in.args.r.b_hh = data(in.bias);
  const RecurrentInputs& r = in.args.r;
  const Tensor& like = in.w_hh;
  const ScalarType type = like.scalar_type();
  // Where w_ih x_t is a tensor, the gates take its place: a buffer of 4 H fewer to fetch and to
  // write. Without padding they fill the first rows of it, and the rest is never touched.
  const bool whole = Backend::kInputProductFirst;
  const Tensor gates =
      whole || save_gates ? empty_activations(like, r.T, r.B, 4 * r.H) : nothing(like);
  if (whole) in.product_into(rows_2d(gates));
  const int64_t h_size[] = {r.T, r.B, r.P}, c_size[] = {r.T, r.B, r.H};
  const Tensor output = empty_on(like, Sizes(h_size, 3), type);
  const Tensor c = save_cells ? empty_on(like, Sizes(c_size, 3), type) : nothing(like);
  Backend::before_first_write(output);
  Backend::before_first_write(c);
  const Tensor h_n = empty_on(like, Sizes(h_size + 1, 2), type);
  const Tensor c_n = empty_on(like, Sizes(c_size + 1, 2), type);
  if (r.B > 0) {
    LstmForwardArgs args{.in = in.args,
                         .gates_x = whole ? gates.const_data_ptr() : nullptr,
                         .gates_x_strides = {r.B * 4 * r.H, 4 * r.H},
                         .x = data(in.x),
                         .w_ih = in.ids ? nullptr : in.w_ih.const_data_ptr(),
                         .I = in.I,
                         .ids = static_cast<const int64_t*>(data(in.ids)),
                         .table = in.ids ? in.w_ih.const_data_ptr() : nullptr,
                         .gates = mutable_data(gates, save_gates),
                         .c = mutable_data(c, save_cells),
                         .h = mutable_data(output),
                         .h_strides = sequence_strides(output),
                         .h_n = mutable_data(h_n),
                         .c_n = mutable_data(c_n),
                         .workspace = nullptr};
    const Scratch scratch(like, Backend::workspace_bytes(args));
    args.workspace = scratch.data();
    Backend::run(args);
  }
  return {output, h_n, c_n, c, save_gates ? gates : nothing(like)};
}

}  // namespace seqkern
