// What ops::lstm and its backward are given: checked, contiguous, and as their contract wants it.
#pragma once

#include "ops/lstm.h"
#include "torch/lstm.h"
#include "torch/tokens.h"

namespace seqkern {

// The contract's inputs, and the tensors made for them (kept alive as long as the pointers).
struct LstmTensors {
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

inline LstmTensors lstm_tensors(std::string_view op, const Tensor& input, const OptionalTensor& h0,
                                const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                const OptionalTensor& w_hr, const OptionalTensor& lengths,
                                bool reverse) {
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
  LstmTensors in{.args = {},
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

}  // namespace seqkern
