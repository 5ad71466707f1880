// What the torch layers of the recurrent ops share: checks, and the products over whole sequences
// that surround the kernels.
#pragma once

#include "ops/recurrent.h"
#include "torch/matrix.h"
#include "torch/scratch.h"

namespace seqkern {

using OptionalTensor = std::optional<Tensor>;

// A tensor that the caller does not want.
inline Tensor nothing(const Tensor& like) { return empty_on(like, {0}, like.scalar_type()); }

inline void* mutable_data(const Tensor& t, bool wanted = true) {
  return wanted ? t.mutable_data_ptr() : nullptr;
}

// The rows of a weight of so many gates, as messages name them.
constexpr std::string_view rows_of_gates(int64_t gates) {
  return gates == 1 ? "H" : gates == 3 ? "3 H" : "4 H";
}

// Checks against the first tensor of an op, `input`.
struct Checker {
  std::string_view op;
  const Tensor& input;

  // `t`, contiguous, if it has this shape and the dtype and device of the input.
  Tensor operator()(const Tensor& t, std::string_view name,
                    std::initializer_list<int64_t> shape) const {
    bool same =
        t.scalar_type() == input.scalar_type() && t.dim() == static_cast<int64_t>(shape.size());
    int64_t d = 0;
    for (const int64_t size : shape) same = same && t.size(d++) == size;
    check(same, op, ": ", name, " must be ", dtype_name(input.scalar_type()), " ",
          shape_name(shape), ", got ", describe(t));
    check_same_device(input, t, op, "input", name);
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

  OptionalTensor operator()(const OptionalTensor& t, std::string_view name,
                            std::initializer_list<int64_t> shape) const {
    return t ? OptionalTensor((*this)(*t, name, shape)) : t;
  }

  // lengths as int64 [B]; values are looked at where the host can.
  OptionalTensor lengths(const OptionalTensor& t, int64_t B, int64_t T) const {
    if (!t) return t;
    const ScalarType type = t->scalar_type();
    check((type == ScalarType::Long || type == ScalarType::Int) && t->dim() == 1 && t->size(0) == B,
          op, ": lengths must be int64 or int32 [", B, "], got ", describe(*t));
    check_same_device(input, *t, op, "input", "lengths");
    const Tensor result = torch::stable::contiguous(
        type == ScalarType::Long ? *t : torch::stable::to(*t, ScalarType::Long));
    if constexpr (Backend::kHostReadable) {
      const auto* L = static_cast<const int64_t*>(result.const_data_ptr());
      for (int64_t b = 0; b < B; ++b) {
        check(L[b] >= 0 && L[b] <= T, op, ": lengths must be in [0, ", T, "], got ", L[b],
              " at row ", b);
      }
    }
    return result;
  }
};

inline SequenceStrides sequence_strides(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

// A gradient [T, B, ...] as kernels read it: where it is if its last dimension allows.
inline OptionalTensor sequence_gradient(const OptionalTensor& t, const Checker& checked,
                                        std::string_view name,
                                        std::initializer_list<int64_t> shape) {
  if (!t) return t;
  int64_t d = 0;
  bool same = t->scalar_type() == checked.input.scalar_type() && t->dim() == 3;
  for (const int64_t size : shape) same = same && t->size(d++) == size;
  check(same, checked.op, ": ", name, " must be ", dtype_name(checked.input.scalar_type()), " ",
        shape_name(shape), ", got ", describe(*t));
  check_same_device(checked.input, *t, checked.op, "input", name);
  return with_unit_last_stride(*t);
}

// ---------------------------------------------------------------- products over all T B rows

inline Tensor narrow(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(t, dim, start, length);
}

// result [N, J] = a [N, K] b [K, J].
inline void mm_into(const Tensor& a, const Tensor& b, const Tensor& result) {
  if (result.numel() == 0) return;
#if defined(SEQKERN_BACKEND_CPU)
  if (a.stride(1) == 1) {
    cpu::DenseArgs args{.dtype = float_dtype(a, "mm", "a"),
                        .N = a.size(0),
                        .K = a.size(1),
                        .M = b.size(1),
                        .a = a.const_data_ptr(),
                        .a_stride = a.stride(0),
                        .w = b.const_data_ptr(),
                        .k_stride = b.stride(0),
                        .m_stride = b.stride(1),
                        .out = result.mutable_data_ptr(),
                        .workspace = nullptr};
    const Scratch scratch(a, Backend::workspace_bytes(args));
    args.workspace = scratch.data();
    return Backend::run(args);
  }
#endif
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(result)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the same as `result`, and ours to release
}

// a b [N, J], in the shape `size` of N J elements. Into a tensor whose pages are had cheaply.
inline Tensor mm(const Tensor& a, const Tensor& b, std::initializer_list<int64_t> size) {
  const Tensor result = empty_on(a, Sizes(size.begin(), size.size()), a.scalar_type());
  Backend::before_first_write(result);
  const int64_t flat[] = {a.size(0), b.size(1)};
  mm_into(a, b, reshaped(result, Sizes(flat, 2)));
  return result;
}

// a + b, either of which may be absent.
inline OptionalTensor sum_of(const OptionalTensor& a, const OptionalTensor& b) {
  if (!a || !b) return a ? a : b;
  return torch::stable::subtract(*a, *b, -1.0);
}

// [T, B, N] as [T B, N]; t is contiguous.
inline Tensor rows_2d(const Tensor& t) {
  const int64_t size[] = {t.size(0) * t.size(1), t.size(2)};
  return torch::stable::view(t, Sizes(size, 2));
}

#if defined(SEQKERN_BACKEND_CPU)
// One gradient of a weight, out = a^T b (+ out); `shift` and `edge` as in cpu/weight_gradient.h.
struct RightSide {
  Tensor b;    // [N, K] contiguous
  Tensor out;  // [M, K] contiguous
  int64_t shift = 0;
  OptionalTensor edge;
};

// Whether weight_gradients takes a [N, M].
inline bool has_rows_for_weight_gradients(const Tensor& a) {
  return a.size(0) >= Backend::kGradientRows && a.stride(1) == 1;
}

// Up to two gradients with the same left side, and the sum of its rows (+ sum) where wanted.
inline void weight_gradients(const Tensor& a, std::initializer_list<RightSide> rights,
                             const Tensor* sum, bool accumulate) {
  cpu::WeightGradientArgs args{.dtype = float_dtype(a, "weight_gradients", "a"),
                               .N = a.size(0),
                               .M = a.size(1),
                               .a = a.const_data_ptr(),
                               .a_stride = a.stride(0),
                               .parts = {},
                               .count = 0,
                               .sum = sum ? sum->mutable_data_ptr() : nullptr,
                               .accumulate = accumulate,
                               .workspace = nullptr};
  for (const RightSide& right : rights) {
    args.parts[args.count++] = {right.b.const_data_ptr(), right.b.size(1), right.shift,
                                right.edge ? right.edge->const_data_ptr() : nullptr,
                                right.out.mutable_data_ptr()};
  }
  const Scratch scratch(a, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Backend::run(args);
}
#endif

// a^T b for a [N, J], b [N, K]: the gradient of a weight.
inline Tensor transposed_mm(const Tensor& a, const Tensor& b) {
#if defined(SEQKERN_BACKEND_CPU)
  if (has_rows_for_weight_gradients(a) && b.is_contiguous()) {
    const Tensor out = empty_on(a, Sizes({a.size(1), b.size(1)}), a.scalar_type());
    Backend::before_first_write(out);
    weight_gradients(a, {{.b = b, .out = out, .edge = {}}}, nullptr, false);
    return out;
  }
#endif
  return mm(transposed(a), b, {a.size(1), b.size(1)});
}

// x [T, B, W] with zeros at times t >= lengths[b]: what stands in the padding may be infinite or
// NaN, which a gradient of zero does not take away. For lengths that only the device can read.
inline Tensor without_padding(const Tensor& x, const Tensor& lengths) {
  const int64_t column[] = {x.size(0), 1}, one[] = {1};
  Tensor ones = empty_on(x, Sizes(column, 2), ScalarType::Long);
  ones = torch::stable::fill_(ones, 1.0);
  StableIValue sum[] = {torch::stable::detail::from(ones), torch::stable::detail::from(int64_t{0}),
                        torch::stable::detail::from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", sum, TORCH_ABI_VERSION));
  const Tensor ends = torch::stable::detail::to<Tensor>(sum[0]);  // t + 1
  StableIValue compare[] = {torch::stable::detail::from(ends),
                            torch::stable::detail::from(lengths)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::le", "Tensor", compare, TORCH_ABI_VERSION));
  const int64_t mask_size[] = {x.size(0), x.size(1), 1};
  const Tensor mask =
      torch::stable::view(torch::stable::detail::to<Tensor>(compare[0]), Sizes(mask_size, 3));
  Tensor zero = empty_on(x, Sizes(one, 1), x.scalar_type());
  zero = torch::stable::fill_(zero, 0.0);
  StableIValue choose[] = {torch::stable::detail::from(mask), torch::stable::detail::from(x),
                           torch::stable::detail::from(zero)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::where", "self", choose, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(choose[0]);
}

// sum over t, b of dgates_t^T h_{t-1}. Times before and after are one row of B apart, so the main
// part is one product; `dgates_0` [B, N] meets h0 where that is given.
inline Tensor recurrent_weight_gradient(const Tensor& dgates, const Tensor& output,
                                        const OptionalTensor& h0, const OptionalTensor& dgates_0,
                                        bool reverse) {
  const int64_t T = dgates.size(0);
  const Tensor later = narrow(dgates, 0, reverse ? 0 : 1, T - 1);
  const Tensor earlier = narrow(output, 0, reverse ? 1 : 0, T - 1);
  Tensor dw = transposed_mm(rows_2d(later), rows_2d(earlier));
  if (!h0) return dw;
  const Tensor first = dgates_0 ? *dgates_0 : torch::stable::select(dgates, 0, reverse ? T - 1 : 0);
  return torch::stable::subtract(dw, transposed_mm(first, *h0), -1.0);
}

}  // namespace seqkern
