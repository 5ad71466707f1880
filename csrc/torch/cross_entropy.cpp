// ops::cross_entropy and its backward: check, allocate, run.
#include "torch/cross_entropy.h"

#include "torch/backend.h"
#include "torch/ops.h"

namespace seqkern {
namespace {

constexpr std::string_view kOp = "cross_entropy";

// The contract's inputs, and the tensors made for them (kept alive as long as the pointers).
struct Inputs {
  CrossEntropyInputs args;
  Tensor logits;
  Tensor target;
  std::optional<Tensor> weight;
  std::optional<Tensor> weight_sum;
};

// Rows of a batch that lie side by side, as those of [B, V, d1, ...] do, whose class dimension
// comes last here; 0 where they do not or are fewer than a vector: such rows are copied.
int64_t rows_side_by_side(const Tensor& t) {
  constexpr int64_t kFewest = 16;
  const int64_t dims = t.dim();
  if (dims < 2 || t.size(dims - 1) == 1 || t.stride(dims - 1) == 1) return 0;
  int64_t side = 1;
  for (int64_t d = dims - 2; d >= (dims > 2 ? 1 : 0); --d) {
    if (t.size(d) != 1 && t.stride(d) != side) return 0;
    side *= t.size(d);
  }
  return side >= kFewest ? side : 0;
}

ClassColumns columns_of(const Tensor& t) {
  return {.batch_stride = t.dim() > 2 ? t.stride(0) : 0, .class_stride = t.stride(t.dim() - 1)};
}

// [N, V] in the order of the inputs' elements.
Tensor empty_gradient(const Tensor& logits, const CrossEntropyInputs& in) {
  if (in.side == 0) return empty_on(logits, logits.sizes(), logits.scalar_type());
  constexpr int64_t kMostDims = 64;
  int64_t strides[kMostDims];
  const int64_t last = logits.dim() - 1;
  strides[last] = in.side;
  int64_t step = 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (d == 0 && last > 1) step *= in.V;
    strides[d] = step;
    step *= logits.size(d);
  }
  return empty_strided_on(logits, logits.sizes(), strides, logits.scalar_type());
}

Inputs prepare(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
               int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  check(logits.dim() >= 1, kOp, ": logits must be [V] or [B, V, ...], got a scalar");
  check_same_device(logits, target, kOp, "logits", "target");
  int64_t side = rows_side_by_side(logits);
  if (is_floating(target) && rows_side_by_side(target) != side) side = 0;
  const auto readable = [&](const Tensor& t) { return side ? t : with_unit_last_stride(t); };
  Inputs inputs{
      .args = {}, .logits = readable(logits), .target = target, .weight = {}, .weight_sum = {}};
  CrossEntropyInputs& in = inputs.args;
  in.dtype = float_dtype(logits, kOp, "logits");
  in.V = logits.size(logits.dim() - 1);
  in.N = in.V > 0 ? logits.numel() / in.V : 0;
  check(in.V > 0, kOp, ": logits must have at least one class, got ", describe(logits));
  in.logits = inputs.logits.const_data_ptr();
  in.side = side;
  if (side) {
    in.logits_columns = columns_of(logits);
  } else {
    in.logits_rows = rows_of(inputs.logits, kOp, "logits");
  }
  in.ignore_index = ignore_index;
  in.label_smoothing = label_smoothing;
  in.z_loss = z_loss;
  in.softcap = softcap;

  if (is_floating(target)) {
    bool same = target.dim() == logits.dim() && target.size(target.dim() - 1) == in.V;
    for (int64_t d = 0; same && d < target.dim(); ++d) same = target.size(d) == logits.size(d);
    check(same && target.scalar_type() == logits.scalar_type(), kOp,
          ": target of class probabilities must be ", describe(logits), ", got ", describe(target));
    inputs.target = readable(target);
    in.target_probs = inputs.target.const_data_ptr();
    if (side) {
      in.target_probs_columns = columns_of(target);
    } else {
      in.target_probs_rows = rows_of(inputs.target, kOp, "target");
    }
  } else {
    check(is_class_index(target) && leading_sizes_match(target, logits), kOp,
          ": target must be int64, int32 or uint8 ", row_shape(logits), ", got ", describe(target));
    inputs.target = as_classes(target);
    in.target = static_cast<const int64_t*>(inputs.target.const_data_ptr());
    check_classes(kOp, in.target, in.N, in.V, ignore_index);
  }

  if (weight) {
    check_same_device(logits, *weight, kOp, "logits", "weight");
    check(is_floating(*weight) && weight->dim() == 1 && weight->size(0) == in.V, kOp,
          ": weight must be floating point [", in.V, "], got ", describe(*weight));
    inputs.weight = torch::stable::contiguous(torch::stable::to(*weight, accumulate_type(logits)));
    in.weight = data(inputs.weight);
    if (label_smoothing > 0 && in.target) {
      inputs.weight_sum = torch::stable::sum(*inputs.weight);
      in.weight_sum = data(inputs.weight_sum);
    }
  }
  return inputs;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 int64_t ignore_index, int64_t reduction,
                                                 double label_smoothing, double z_loss,
                                                 double softcap, bool return_lse) {
  check_options(kOp, reduction, label_smoothing, z_loss, softcap);
  [[maybe_unused]] const Backend::Guard guard(logits);
  const Inputs inputs =
      prepare(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap);
  const CrossEntropyInputs& in = inputs.args;
  const ScalarType acc = accumulate_type(logits);
  const auto kind = static_cast<Reduction>(reduction);
  const bool reduced = kind != Reduction::kNone;
  const Sizes row_sizes(logits.sizes().data(), logits.dim() - 1);
  const int64_t saved_sizes[] = {SavedRows<char>::size(in.N, reduced)};
  const int64_t no_rows[] = {0};
  Tensor row_loss = empty_on(logits, row_sizes, acc);
  Tensor lse = empty_on(logits, return_lse ? row_sizes : Sizes(no_rows, 1), acc);
  Tensor saved = empty_on(logits, Sizes(saved_sizes, 1), acc);
  const SavedRows parts(static_cast<char*>(saved.mutable_data_ptr()), in.N, reduced,
                        saved.element_size());
  if (in.N > 0) {
    Backend::run(CrossEntropyForwardArgs{.in = in,
                                         .add_z_loss = z_loss != 0 && !reduced,
                                         .row_loss = row_loss.mutable_data_ptr(),
                                         .lse = return_lse ? lse.mutable_data_ptr() : nullptr,
                                         .row_max = parts.row_max,
                                         .row_log_sum = parts.row_log_sum});
  }
  if (!reduced) return {row_loss, lse, saved};
  Tensor loss = empty_on(logits, {}, acc);
  Backend::run(CrossEntropyReduceArgs{.in = in,
                                      .reduction = kind,
                                      .row_loss = row_loss.const_data_ptr(),
                                      .row_max = parts.row_max,
                                      .row_log_sum = parts.row_log_sum,
                                      .loss = loss.mutable_data_ptr(),
                                      .norm = parts.norm});
  return {loss, lse, saved};
}

Tensor cross_entropy_backward(const std::optional<Tensor>& grad_loss,
                              const std::optional<Tensor>& grad_lse, const Tensor& logits,
                              const Tensor& target, const std::optional<Tensor>& weight,
                              const Tensor& saved, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, double z_loss, double softcap) {
  check_options(kOp, reduction, label_smoothing, z_loss, softcap);
  [[maybe_unused]] const Backend::Guard guard(logits);
  const Inputs inputs =
      prepare(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap);
  const CrossEntropyInputs& in = inputs.args;
  const ScalarType acc = accumulate_type(logits);
  const bool reduced = static_cast<Reduction>(reduction) != Reduction::kNone;
  const auto contiguous = [&](const std::optional<Tensor>& t, std::string_view name,
                              int64_t numel) {
    if (!t) return t;
    check(t->numel() == numel && t->scalar_type() == acc, "cross_entropy_backward: ", name,
          " must be ", dtype_name(acc), " with ", numel, " elements, got ", describe(*t));
    check_same_device(logits, *t, "cross_entropy_backward", "logits", name);
    return std::optional<Tensor>(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
  };
  const auto g_loss = contiguous(grad_loss, "grad_loss", reduced ? 1 : in.N);
  const auto g_lse = contiguous(grad_lse, "grad_lse", in.N);
  const auto kept = contiguous(saved, "saved", SavedRows<char>::size(in.N, reduced));
  const SavedRows parts(static_cast<const char*>(kept->const_data_ptr()), in.N, reduced,
                        kept->element_size());

  Tensor dlogits = empty_gradient(logits, in);
  Backend::before_first_write(dlogits);
  if (in.N > 0) {
    Backend::run(CrossEntropyBackwardArgs{.in = in,
                                          .grad_loss = data(g_loss),
                                          .grad_loss_stride = reduced ? 0 : 1,
                                          .grad_lse = data(g_lse),
                                          .row_max = parts.row_max,
                                          .row_log_sum = parts.row_log_sum,
                                          .norm = parts.norm,
                                          .dlogits = dlogits.mutable_data_ptr()});
  }
  return dlogits;
}

}  // namespace seqkern
