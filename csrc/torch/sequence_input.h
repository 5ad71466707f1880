// What a recurrent layer reads: x and W_ih, or ids that stand for one-hot vectors. Checked, and as
// products over the whole sequence need them.
#pragma once

#include "torch/embedding.h"
#include "torch/recurrent.h"
#include "torch/tokens.h"

namespace seqkern {

struct SequenceInput {
  DType dtype = DType::kFloat32;
  int64_t T = 0, B = 0, I = 0, H = 0;
  // Either x [T, B, I] and the weight [G H, I], or ids, int64 [T, B], and the weight's transpose,
  // whose rows they number. All contiguous.
  OptionalTensor x;
  OptionalTensor ids;
  Tensor w_ih;
  OptionalTensor lengths;
  std::optional<Tokens> tokens;  // with lengths that the host can read

  // N: all times of all rows, or the real tokens.
  int64_t count() const { return tokens ? tokens->count : T * B; }

  // out [N, G H]: W_ih x.
  void product_into(const Tensor& out) const {
    if (ids) return look_up_into(w_ih, ids_of_rows(), out);
    mm_into(rows(), transposed(w_ih), out);
  }

  // dx [T, B, I] from da [N, G H].
  Tensor gradient(const Tensor& da) const {
    if (tokens) return tokens->scatter(mm(da, w_ih, {da.size(0), I}));
    return mm(da, w_ih, {T, B, I});
  }

  // dW_ih [G H, I] from da [N, G H].
  Tensor weight_gradient(const Tensor& da) const {
    if (ids) return torch::stable::transpose(embedding_gradient(da, ids_of_rows(), I), 0, 1);
    return transposed_mm(da, lengths && !tokens ? rows_2d(without_padding(*x, *lengths)) : rows());
  }

  // h0 [B, P] for a product over all rows: without that of rows of no steps, which is not read and
  // may be anything.
  OptionalTensor state_of_first_steps(const OptionalTensor& h0) const {
    if (!h0 || !lengths || tokens) return h0;
    const int64_t step[] = {1, h0->size(0), h0->size(1)}, size[] = {h0->size(0), h0->size(1)};
    const Tensor state = torch::stable::view(*h0, Sizes(step, 3));
    return torch::stable::view(without_padding(state, *lengths), Sizes(size, 2));
  }

  // x as [N, I].
  Tensor rows() const { return tokens ? tokens->gather(*x) : rows_2d(*x); }

  // ids as [N].
  Tensor ids_of_rows() const {
    const int64_t column[] = {T, B, 1}, size[] = {count()};
    const Tensor columns = torch::stable::view(*ids, Sizes(column, 3));
    return torch::stable::view(tokens ? tokens->gather(columns) : columns, Sizes(size, 1));
  }
};

inline bool are_ids(const Tensor& input) {
  const ScalarType type = input.scalar_type();
  return (type == ScalarType::Long || type == ScalarType::Int) && input.dim() < 3;
}

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

// Of a layer with so many gates.
inline SequenceInput sequence_input(std::string_view op, const Tensor& input, const Tensor& w_ih,
                                    const OptionalTensor& lengths, int64_t gates) {
  const bool by_ids = are_ids(input);
  const Tensor& like = by_ids ? w_ih : input;  // in dtype
  SequenceInput in;
  in.dtype = float_dtype(like, op, by_ids ? "w_ih" : "input");
  check(input.dim() == (by_ids ? 2 : 3), op, ": input must be ", by_ids ? "[T, B]" : "[T, B, I]",
        ", got ", describe(input));
  in.T = input.size(0), in.B = input.size(1);
  check(in.T >= 1, op, ": input must have at least one step, got ", describe(input));
  check(w_ih.dim() == 2 && w_ih.size(0) >= gates && w_ih.size(0) % gates == 0, op,
        ": w_ih must be [", rows_of_gates(gates), ", I], got ", describe(w_ih));
  in.H = w_ih.size(0) / gates, in.I = by_ids ? w_ih.size(1) : input.size(2);
  check_same_device(input, w_ih, op, "input", "w_ih");
  const Checker checked{op, like};
  const auto contiguous = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  in.lengths = checked.lengths(lengths, in.B, in.T);
  if (by_ids) {
    in.w_ih = contiguous(transposed(w_ih));
    in.ids = checked_ids(op, input, in.I, in.lengths);
  } else {
    in.w_ih = checked(w_ih, "w_ih", {gates * in.H, in.I});
    in.x = contiguous(input);
  }
  if (Backend::kHostReadable && in.lengths) {
    in.tokens.emplace(static_cast<const int64_t*>(in.lengths->const_data_ptr()), in.T, in.B);
  }
  return in;
}

}  // namespace seqkern
