// What ops::lstm and its backward are given: checked, contiguous, and as their contract wants it.
#pragma once

#include "ops/lstm.h"
#include "torch/lstm.h"
#include "torch/sequence_input.h"

namespace seqkern {

// The contract's inputs, and the tensors made for them (kept alive as long as the pointers).
struct LstmTensors : SequenceInput {
  LstmInputs args;
  Tensor w_hh;
  OptionalTensor b_ih;
  OptionalTensor b_hh;
  OptionalTensor bias;  // their sum, where that is wanted
  OptionalTensor w_hr;
  OptionalTensor h0;
  OptionalTensor c0;

#if defined(SEQKERN_BACKEND_CPU)
  // A sequence of one step, as in generation: no product over time, so no weight worth packing.
  bool is_step() const { return T == 1 && B > 0 && !w_hr && !lengths && !ids; }
  cpu::CellStepInputs step() const {
    return {.dtype = dtype,
            .cell = cpu::StepCell::kLstm,
            .B = B,
            .I = I,
            .H = H,
            .x = data(x),
            .h0 = data(h0),
            .c0 = data(c0),
            .w_ih = w_ih.const_data_ptr(),
            .w_hh = w_hh.const_data_ptr(),
            .b_ih = data(b_ih),
            .b_hh = data(b_hh)};
  }
#endif
};

inline LstmTensors lstm_tensors(std::string_view op, const Tensor& input, const OptionalTensor& h0,
                                const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                const OptionalTensor& w_hr, const OptionalTensor& lengths,
                                bool reverse) {
  LstmTensors in{sequence_input(op, input, w_ih, lengths, 4), {}, w_hh, {}, {}, {}, {}, {}, {}};
  const auto [T, B, H] = std::tuple(in.T, in.B, in.H);
  if (w_hr) {
    check(w_hr->dim() == 2 && w_hr->size(0) >= 1, op, ": w_hr must be [P, H], got ",
          describe(*w_hr));
  }
  const int64_t P = w_hr ? w_hr->size(0) : H;
  const Checker checked{op, in.w_ih};
  in.w_hh = checked(w_hh, "w_hh", {4 * H, P});
  in.b_ih = checked(b_ih, "b_ih", {4 * H});
  in.b_hh = checked(b_hh, "b_hh", {4 * H});
  in.w_hr = checked(w_hr, "w_hr", {P, H});
  in.h0 = checked(h0, "h0", {B, P});
  in.c0 = checked(c0, "c0", {B, H});
  in.args = {.r = {.dtype = in.dtype,
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

}  // namespace seqkern
