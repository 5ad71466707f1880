// The backward of ops::lstm: the kernel, then the products that make dx and the weights' gradients
// from what it leaves.
#include <algorithm>

#include "torch/lstm_inputs.h"
#include "torch/ops_recurrent.h"

namespace seqkern {
namespace {

// Steps [begin, begin + steps) of a sequence [T, B, ...].
Tensor times(const Tensor& t, int64_t begin, int64_t steps) {
  return steps == t.size(0) ? t : narrow(t, 0, begin, steps);
}
const void* data_at(const OptionalTensor& t, int64_t begin, int64_t steps) {
  return t ? times(*t, begin, steps).const_data_ptr() : nullptr;
}

// Steps that backward takes at a time. dgates of a long sequence are written to memory, fetched
// twice, and come from fresh pages; of a part of it they stay in cache, and the next part takes
// their place. A part should be worth packing the weights for.
int64_t steps_at_a_time(const LstmTensors& in, int64_t needs) {
#if defined(SEQKERN_BACKEND_CPU)
  constexpr int64_t kPartBytes = 8 << 20, kPartOfWeights = 8;
  const RecurrentInputs& r = in.args.r;
  const int64_t item = in.w_hh.element_size();
  const bool exact = item == (r.dtype == DType::kFloat64 ? 8 : 4);
  const int64_t weights = kWih | kWhh;
  if (!exact || in.lengths || in.w_hr || (needs & weights) != weights) return r.T;
  const int64_t step_bytes = r.B * 4 * r.H * item;
  const int64_t weight_bytes = 4 * r.H * (r.P + (in.ids ? 0 : in.I)) * item;
  const int64_t part = std::max(kPartBytes, kPartOfWeights * weight_bytes);
  const int64_t parts = (r.T * step_bytes + part - 1) / part;
  if (parts < 2) return r.T;
  // Each part adds to the weights' gradients, the last one too, which may be shorter.
  const int64_t steps = (r.T + parts - 1) / parts;
  const int64_t rest = r.T - (r.T - 1) / steps * steps;
  return rest * r.B < Backend::kGradientRows ? r.T : steps;
#else
  (void)needs;
  return in.args.r.T;
#endif
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
    const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& lengths, const Tensor& output,
    const Tensor& c, const Tensor& gates, bool activated, bool reverse, int64_t needs) {
  constexpr std::string_view kOp = "lstm_backward";
  [[maybe_unused]] const Backend::Guard guard(input);
  const LstmTensors in =
      lstm_tensors(kOp, input, h0, c0, w_ih, w_hh, {}, {}, w_hr, lengths, reverse);
  const auto [T, B, H, P] = std::tuple(in.args.r.T, in.args.r.B, in.args.r.H, in.args.r.P);
  const Tensor& like = in.w_hh;
  const Checker checked{kOp, like};
  const Tensor kept_h = checked(output, "output", {T, B, P});
  const Tensor kept_c = checked(c, "c", {T, B, H});
  Tensor kept_gates = checked(gates, "gates", {T, B, 4 * H});
  if (in.tokens && !activated) kept_gates = in.tokens->gather(kept_gates);
  const auto dh = sequence_gradient(grad_output, checked, "grad_output", {T, B, P});
  const auto dc = checked(grad_c, "grad_c", {T, B, H});
  const auto dh_n = checked(grad_h_n, "grad_h_n", {B, P});
  const auto dc_n = checked(grad_c_n, "grad_c_n", {B, H});

#if defined(SEQKERN_BACKEND_CPU)
  if (in.is_step() && activated && is_step_of_few_rows(in.step())) {
    const auto dh_1 = step_gradient(dh, dh_n), dc_1 = step_gradient(dc, dc_n);
    const Tensor dc0 =
        needs & kC0 ? empty_on(like, in.c0->sizes(), like.scalar_type()) : nothing(like);
    const StepGradients d = run_step_backward(like, step_wanted(needs),
                                              {.in = in.step(),
                                               .gates = kept_gates.const_data_ptr(),
                                               .c = kept_c.const_data_ptr(),
                                               .dh = data(dh_1),
                                               .dc = data(dc_1),
                                               .dc0 = mutable_data(dc0, needs & kC0)});
    const int64_t size[] = {1, B, in.I};
    const Tensor dx = needs & kInput ? torch::stable::view(d.input, Sizes(size, 3)) : d.input;
    return {dx, d.h0, dc0, d.w_ih, d.w_hh, d.b_ih, nothing(like)};
  }
#endif

  const ScalarType type = like.scalar_type();
  const auto fresh = [&](bool wanted, std::initializer_list<int64_t> size) {
    const Tensor t =
        wanted ? empty_on(like, Sizes(size.begin(), size.size()), type) : nothing(like);
    Backend::before_first_write(t);
    return t;
  };
  const int64_t most_steps = steps_at_a_time(in, needs);
  const bool in_parts = most_steps < T;
  const bool project = w_hr.has_value();
  const bool first_elsewhere = h0 && lengths && !in.tokens && reverse && (needs & kWhh);
  // Rows of whole KB would fall into few sets of the caches that the products read them from.
  const int64_t line = 64 / static_cast<int64_t>(like.element_size());
  const int64_t dgates_row = 4 * H + (Backend::kRowsApart ? line : 0);
  const ScratchTensor dgates_memory(like, most_steps, B, 4 * H, dgates_row);
  const Tensor& dgates = dgates_memory.tensor();
  const Tensor dgates_0 = fresh(first_elsewhere, {B, 4 * H});
  const Tensor dh0 = fresh(needs & kH0, {B, P});
  const Tensor dc0 = fresh(needs & kC0, {B, H});
  // Between two parts: the gradient of the state there, which the later leaves and the earlier
  // reads before it leaves its own.
  const Tensor dh_between = fresh(in_parts, {B, P});
  const Tensor dc_between = fresh(in_parts, {B, H});
  const Tensor dh_total = fresh(project, {T, B, P});
  const Tensor m = fresh(project, {T, B, H});
  if (in.ids) needs &= ~kInput;
  Tensor dx = fresh((needs & kInput) && !in.tokens, {T, B, in.I});
  Tensor dw_ih = in.ids ? fresh(needs & kWih, {in.I, 4 * H}) : fresh(needs & kWih, {4 * H, in.I});
  Tensor dw_hh = fresh(needs & kWhh, {4 * H, P});
  Tensor dbias = fresh(needs & kBias, {4 * H});
  int64_t left = needs & (kWih | kWhh | kBias);  // whose products are not made yet

  for (int64_t done = 0; done < T; done += most_steps) {
    const int64_t steps = std::min(most_steps, T - done);
    const int64_t begin = reverse ? done : T - done - steps;
    const bool is_last_part = done == 0, is_first_part = done + steps == T;
    // The states before the first step of the part.
    const int64_t before = reverse ? begin + steps : begin - 1;
    const OptionalTensor h_before =
        is_first_part ? in.h0 : OptionalTensor(torch::stable::select(kept_h, 0, before));
    const OptionalTensor c_before =
        is_first_part ? in.c0 : OptionalTensor(torch::stable::select(kept_c, 0, before));
    if (B > 0) {
      LstmBackwardArgs args{
          .in = in.args,
          .gates =
              data_at(kept_gates, in.tokens ? 0 : begin, in.tokens ? kept_gates.size(0) : steps),
          .activated = activated,
          .c = data_at(kept_c, begin, steps),
          .dh = data_at(dh, begin, steps),
          .dh_strides = dh ? sequence_strides(*dh) : SequenceStrides{},
          .dc = data_at(dc, begin, steps),
          .dh_n = is_last_part ? data(dh_n) : dh_between.const_data_ptr(),
          .dc_n = is_last_part ? data(dc_n) : dc_between.const_data_ptr(),
          .dgates = mutable_data(dgates),
          .dgates_row = dgates_row,
          .dgates_0 = mutable_data(dgates_0, first_elsewhere),
          .dh0 = is_first_part ? mutable_data(dh0, needs & kH0) : mutable_data(dh_between),
          .dc0 = is_first_part ? mutable_data(dc0, needs & kC0) : mutable_data(dc_between),
          .dh_total = mutable_data(dh_total, project),
          .m = mutable_data(m, project),
          .workspace = nullptr};
      args.in.r.T = steps;
      args.in.c0 = data(c_before);
      const Scratch scratch(like, Backend::workspace_bytes(args));
      args.workspace = scratch.data();
      Backend::run(args);
    }
    // [steps B or tokens, 4 H]
    const Tensor flat = narrow(rows_2d(dgates), 0, 0, in.tokens ? in.tokens->count : steps * B);
    if (needs & kInput) {
      if (in.tokens) {
        dx = in.gradient(flat);
      } else {
        mm_into(flat, in.w_ih, rows_2d(times(dx, begin, steps)));
      }
    }
#if defined(SEQKERN_BACKEND_CPU)
    if (in.ids && (needs & kWih)) {
      const Tensor ids = in.ids_of_rows();
      const auto* first = static_cast<const int64_t*>(ids.const_data_ptr()) + begin * B;
      embedding_gradient_into(flat, first, dw_ih, !is_last_part);
      left &= ~kWih;
    }
    if ((needs & kWih) && (needs & kWhh) && has_rows_for_weight_gradients(flat)) {
      const RightSide h = in.tokens
                              ? RightSide{.b = in.tokens->states_before(kept_h, in.h0, reverse),
                                          .out = dw_hh,
                                          .edge = {}}
                              : RightSide{.b = rows_2d(times(kept_h, begin, steps)),
                                          .out = dw_hh,
                                          .shift = reverse ? -B : B,
                                          .edge = h_before};
      const Tensor* sum = needs & kBias ? &dbias : nullptr;
      if (in.ids) {
        weight_gradients(flat, {h}, sum, !is_last_part);
      } else {
        const RightSide x{.b = in.tokens ? in.rows() : rows_2d(times(*in.x, begin, steps)),
                          .out = dw_ih,
                          .edge = {}};
        weight_gradients(flat, {x, h}, sum, !is_last_part);
      }
      left = 0;
    }
#endif
  }

  const Tensor flat = left ? narrow(rows_2d(dgates), 0, 0, in.count()) : nothing(like);
  if (left & kWih) {
    dw_ih = in.weight_gradient(flat);
  } else if (in.ids && (needs & kWih)) {
    dw_ih = torch::stable::transpose(dw_ih, 0, 1);
  }
  if (left & kWhh) {
    dw_hh = in.tokens ? transposed_mm(flat, in.tokens->states_before(kept_h, in.h0, reverse))
                      : recurrent_weight_gradient(
                            dgates, kept_h, in.state_of_first_steps(in.h0),
                            first_elsewhere ? OptionalTensor(dgates_0) : OptionalTensor(), reverse);
  }
  const int64_t rows[] = {0};
  if (left & kBias) dbias = torch::stable::sum(flat, Sizes(rows, 1));
  const Tensor dw_hr =
      project && (needs & kWhr) ? transposed_mm(rows_2d(dh_total), rows_2d(m)) : nothing(like);
  return {dx, dh0, dc0, dw_ih, dw_hh, dbias, dw_hr};
}

}  // namespace seqkern
