// ops::cross_entropy and its backward: check, allocate, run.
#include "ops/cross_entropy.h"

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

bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

Tensor with_unit_last_stride(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

void check_options(int64_t reduction, double label_smoothing, double z_loss, double softcap) {
  check(reduction >= 0 && reduction <= 2, kOp,
        ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  check(label_smoothing >= 0 && label_smoothing <= 1, kOp,
        ": label_smoothing must be between 0 and 1, got ", label_smoothing);
  check(z_loss >= 0, kOp, ": z_loss must be at least 0, got ", z_loss);
  check(softcap >= 0, kOp, ": softcap must be at least 0, got ", softcap);
}

bool leading_sizes_match(const Tensor& rows, const Tensor& logits) {
  if (rows.dim() != logits.dim() - 1) return false;
  for (int64_t d = 0; d < rows.dim(); ++d) {
    if (rows.size(d) != logits.size(d)) return false;
  }
  return true;
}

std::string row_shape(const Tensor& logits) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) out << (d ? ", " : "") << logits.size(d);
  out << ']';
  return out.str();
}

void check_classes(const CrossEntropyInputs& in) {
  if constexpr (Backend::kHostReadable) {
    for (int64_t n = 0; n < in.N; ++n) {
      const int64_t y = in.target[n];
      if (static_cast<uint64_t>(y) >= static_cast<uint64_t>(in.V) && y != in.ignore_index) [[unlikely]] {
        throw std::out_of_range(message(kOp, ": target must be in [0, ", in.V, ") or ignore_index (",
                                        in.ignore_index, "), got ", y, " at row ", n));
      }
    }
  }
}

Inputs prepare(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
               int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  check(logits.dim() >= 1, kOp, ": logits must be [..., V], got a scalar");
  check_same_device(logits, target, kOp, "logits", "target");
  Inputs inputs{.args = {}, .logits = with_unit_last_stride(logits), .target = target, .weight = {}, .weight_sum = {}};
  CrossEntropyInputs& in = inputs.args;
  in.dtype = float_dtype(logits, kOp, "logits");
  in.V = logits.size(logits.dim() - 1);
  in.N = in.V > 0 ? logits.numel() / in.V : 0;
  check(in.V > 0, kOp, ": logits must have at least one class, got ", describe(logits));
  in.logits = inputs.logits.const_data_ptr();
  in.logits_rows = rows_of(inputs.logits, kOp, "logits");
  in.ignore_index = ignore_index;
  in.label_smoothing = label_smoothing;
  in.z_loss = z_loss;
  in.softcap = softcap;

  if (is_floating(target)) {
    bool same = target.dim() == logits.dim() && target.size(target.dim() - 1) == in.V;
    for (int64_t d = 0; same && d < target.dim(); ++d) same = target.size(d) == logits.size(d);
    check(same && target.scalar_type() == logits.scalar_type(), kOp,
          ": target of class probabilities must be ", describe(logits), ", got ", describe(target));
    inputs.target = with_unit_last_stride(target);
    in.target_probs = inputs.target.const_data_ptr();
    in.target_probs_rows = rows_of(inputs.target, kOp, "target");
  } else {
    const ScalarType type = target.scalar_type();
    check((type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Byte) &&
              leading_sizes_match(target, logits),
          kOp, ": target must be int64, int32 or uint8 ", row_shape(logits), ", got ", describe(target));
    if (type != ScalarType::Long) inputs.target = torch::stable::to(target, ScalarType::Long);
    if (!inputs.target.is_contiguous()) inputs.target = torch::stable::contiguous(inputs.target);
    in.target = static_cast<const int64_t*>(inputs.target.const_data_ptr());
    check_classes(in);
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
                                                 double softcap, bool lse_of_ignored) {
  check_options(reduction, label_smoothing, z_loss, softcap);
  const Inputs inputs =
      prepare(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap);
  const CrossEntropyInputs& in = inputs.args;
  const ScalarType acc = accumulate_type(logits);
  const auto kind = static_cast<Reduction>(reduction);
  const auto row_sizes = torch::headeronly::IntHeaderOnlyArrayRef(logits.sizes().data(), logits.dim() - 1);
  const auto rows = [&] { return torch::stable::empty(row_sizes, acc, std::nullopt, logits.device()); };
  Tensor row_loss = rows();
  Tensor lse = rows();
  Tensor norm = empty_on(logits, {2}, acc);
  if (in.N > 0) {
    Backend::run(CrossEntropyForwardArgs{.in = in,
                                         .lse_of_ignored = lse_of_ignored,
                                         .add_z_loss = z_loss != 0 && kind == Reduction::kNone,
                                         .row_loss = row_loss.mutable_data_ptr(),
                                         .lse = lse.mutable_data_ptr()});
  }
  if (kind == Reduction::kNone) {
    torch::stable::fill_(norm, 1.0);
    return {row_loss, lse, norm};
  }
  Tensor loss = empty_on(logits, {}, acc);
  Backend::run(CrossEntropyReduceArgs{.in = in,
                                      .reduction = kind,
                                      .row_loss = row_loss.const_data_ptr(),
                                      .lse = lse.const_data_ptr(),
                                      .loss = loss.mutable_data_ptr(),
                                      .norm = norm.mutable_data_ptr()});
  return {loss, lse, norm};
}

Tensor cross_entropy_backward(const std::optional<Tensor>& grad_loss,
                              const std::optional<Tensor>& grad_lse, const Tensor& logits,
                              const Tensor& target, const std::optional<Tensor>& weight,
                              const Tensor& lse, const Tensor& norm, int64_t ignore_index,
                              int64_t reduction, double label_smoothing, double z_loss,
                              double softcap) {
  check_options(reduction, label_smoothing, z_loss, softcap);
  const Inputs inputs =
      prepare(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap);
  const CrossEntropyInputs& in = inputs.args;
  const ScalarType acc = accumulate_type(logits);
  const bool per_row = static_cast<Reduction>(reduction) == Reduction::kNone;
  const auto rows_like = [&](const std::optional<Tensor>& t, std::string_view name, int64_t numel) {
    if (!t) return t;
    check(t->numel() == numel && t->scalar_type() == acc, "cross_entropy_backward: ", name, " must be ",
          dtype_name(acc), " with ", numel, " elements, got ", describe(*t));
    return std::optional<Tensor>(torch::stable::contiguous(*t));
  };
  const auto g_loss = rows_like(grad_loss, "grad_loss", per_row ? in.N : 1);
  const auto g_lse = rows_like(grad_lse, "grad_lse", in.N);
  const auto saved_lse = rows_like(lse, "lse", in.N);
  const auto saved_norm = rows_like(norm, "norm", 2);

  Tensor dlogits = torch::stable::empty(logits.sizes(), logits.scalar_type(), std::nullopt, logits.device());
  Backend::before_first_write(dlogits);
  if (in.N > 0) {
    Backend::run(CrossEntropyBackwardArgs{.in = in,
                                          .grad_loss = data(g_loss),
                                          .grad_loss_stride = per_row ? 1 : 0,
                                          .grad_lse = data(g_lse),
                                          .lse = data(saved_lse),
                                          .norm = data(saved_norm),
                                          .dlogits = dlogits.mutable_data_ptr()});
  }
  return dlogits;
}

}  // namespace seqkern
