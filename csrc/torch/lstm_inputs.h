// What ops::lstm and its backward are given: checked, contiguous, and as their contract wants it.
#pragma once

#include "ops/lstm.h"
#include "torch/embedding.h"
#include "torch/lstm.h"
#include "torch/tokens.h"

namespace seqkern {

// The contract's inputs, and the tensors made for them (kept alive as long as the pointers).
struct LstmTensors {
  LstmInputs args;
  int64_t I;
  // Either x and the weight [4 H, I], or ids, int64 [T, B], and the weight's transpose, whose rows
  // they number.
  std::optional<Tensor> input;
  std::optional<Tensor> ids;
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

// ids as int64; those of real tokens are looked at where the host can. Where it cannot, those of
// the padding, which may be anything, become 0.
inline Tensor checked_ids(std::string_view op, const Tensor& input, int64_t I,
                          const OptionalTensor& lengths) {
  const Tensor ids = torch::stable::contiguous(
      input.scalar_type() == ScalarType::Long ? input : torch::stable::to(input, ScalarType::Long));
  const int64_t T = ids.size(0), B = ids.size(1);
  if constexpr (Backend::kHostReadable) {
    const auto* values = static_cast<const int64_t*>(ids.const_data_ptr());
    const auto* steps = static_cast<const int64_t*>(data(lengths));
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < B; ++b) {
        const int64_t id = values[t * B + b];
        check((id >= 0 && id < I) || (steps && t >= steps[b]), op, ": input must be in [0, ", I,
              "), got ", id, " at [", t, ", ", b, "]");
      }
    }
    return ids;
  }
  if (!lengths) return ids;
  const int64_t size[] = {T, B}, column[] = {T, B, 1};
  return torch::stable::view(without_padding(torch::stable::view(ids, Sizes(column, 3)), *lengths),
                             Sizes(size, 2));
}

inline LstmTensors lstm_tensors(std::string_view op, const Tensor& input, const OptionalTensor& h0,
                                const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                const OptionalTensor& w_hr, const OptionalTensor& lengths,
                                bool reverse) {
  const ScalarType given = input.scalar_type();
  const bool are_ids = (given == ScalarType::Long || given == ScalarType::Int) && input.dim() < 3;
  const Tensor& like = are_ids ? w_ih : input;  // in dtype
  const DType dtype = float_dtype(like, op, are_ids ? "w_ih" : "input");
  check(input.dim() == (are_ids ? 2 : 3), op, ": input must be ", are_ids ? "[T, B]" : "[T, B, I]",
        ", got ", describe(input));
  const int64_t T = input.size(0), B = input.size(1);
  check(T >= 1, op, ": input must have at least one step, got ", describe(input));
  check(w_ih.dim() == 2 && w_ih.size(0) >= 4 && w_ih.size(0) % 4 == 0, op,
        ": w_ih must be [4 H, I], got ", describe(w_ih));
  const int64_t H = w_ih.size(0) / 4, I = are_ids ? w_ih.size(1) : input.size(2);
  check(!w_hr || (w_hr->dim() == 2 && w_hr->size(0) >= 1), op, ": w_hr must be [P, H], got ",
        w_hr ? describe(*w_hr) : "");
  const int64_t P = w_hr ? w_hr->size(0) : H;
  check_same_device(input, w_ih, op, "input", "w_ih");
  const Checker checked{op, like};
  const auto contiguous = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  LstmTensors in{.args = {},
                 .I = I,
                 .input = are_ids ? OptionalTensor() : contiguous(input),
                 .ids = {},
                 .w_ih = are_ids ? contiguous(torch::stable::transpose(w_ih, 0, 1))
                                 : checked(w_ih, "w_ih", {4 * H, I}),
                 .w_hh = checked(w_hh, "w_hh", {4 * H, P}),
                 .b_ih = checked(b_ih, "b_ih", {4 * H}),
                 .b_hh = checked(b_hh, "b_hh", {4 * H}),
                 .bias = {},
                 .w_hr = checked(w_hr, "w_hr", {P, H}),
                 .h0 = checked(h0, "h0", {B, P}),
                 .c0 = checked(c0, "c0", {B, H}),
                 .lengths = checked.lengths(lengths, B, T),
                 .tokens = {}};
  if (are_ids) in.ids = checked_ids(op, input, I, in.lengths);
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
