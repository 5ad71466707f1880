// ops::linear_cross_entropy, its backward, and the state a rank of a vocabulary-parallel head
// contributes: check, allocate, run chunk after chunk.
#include "torch/linear_cross_entropy.h"

#include "torch/ops.h"

namespace seqkern {
namespace {

using namespace linear_cross_entropy_parts;

Tensor rows_on(const Head& head, int64_t rows) {
  const int64_t sizes[] = {rows};
  return empty_on(head.hidden, Sizes(sizes, 1), head.acc);
}

Tensor zeros_on(const Head& head, int64_t rows) {
  Tensor t = rows_on(head, rows);
  torch::stable::zero_(t);
  return t;
}

template <class T>
char* at(const T& t, int64_t n) {
  return static_cast<char*>(t.mutable_data_ptr()) + n * t.element_size();
}

// The kernel that reduces cross_entropy's rows does ours as well.
struct Reducer {
  Reducer(const Head& head, int64_t reduction)
      : in{.dtype = head.acc_dtype,
           .N = head.R(),
           .V = head.rows.V,
           .logits = nullptr,
           .logits_rows = {},
           .side = 0,
           .logits_columns = {},
           .target = head.rows.target,
           .target_probs = nullptr,
           .target_probs_rows = {},
           .target_probs_columns = {},
           .weight = head.rows.class_weight,
           .weight_sum = head.rows.weight_sum,
           .ignore_index = head.rows.ignore_index,
           .label_smoothing = head.rows.label_smoothing,
           .z_loss = head.rows.z_loss,
           .softcap = 0},
        reduction(static_cast<Reduction>(reduction)) {}

  void run(const Tensor& row_loss, const Tensor& row_max, const Tensor& row_log_sum,
           const Tensor& loss, const Tensor& norm) const {
    Backend::run(CrossEntropyReduceArgs{.in = in,
                                        .reduction = reduction,
                                        .row_loss = row_loss.const_data_ptr(),
                                        .row_max = row_max.const_data_ptr(),
                                        .row_log_sum = row_log_sum.const_data_ptr(),
                                        .loss = loss.mutable_data_ptr(),
                                        .norm = norm.mutable_data_ptr()});
  }

  CrossEntropyInputs in;
  Reduction reduction;
};

// [N] in the gradient's dtype and order of the kept rows; a scalar as it is.
std::optional<Tensor> row_gradient(const Head& head, const std::optional<Tensor>& t,
                                   std::string_view name, bool scalar) {
  if (!t) return t;
  const int64_t numel = scalar ? 1 : head.N;
  check(t->numel() == numel && t->scalar_type() == head.acc,
        "linear_cross_entropy_backward: ", name, " must be ", dtype_name(head.acc), " with ", numel,
        " elements, got ", describe(*t));
  check_same_device(head.hidden, *t, "linear_cross_entropy_backward", "hidden", name);
  const int64_t sizes[] = {numel};
  const Tensor flat = torch::stable::contiguous(reshaped(*t, Sizes(sizes, 1)));
  return scalar ? flat : to_kept(head, flat);
}

std::tuple<Tensor, Tensor, Tensor> finished(const Head& head, const Gradients& grads,
                                            Sizes hidden_sizes) {
  return {grads.hidden ? reshaped(from_kept(head, *grads.hidden), hidden_sizes) : rows_on(head, 0),
          grads.weight ? torch::stable::to(*grads.weight, weight_gradient_type(head))
                       : rows_on(head, 0),
          grads.bias ? *grads.bias : rows_on(head, 0)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& class_weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss, double softcap,
    bool return_lse, bool return_logprobs, bool grad_hidden, bool grad_weight, bool grad_bias,
    int64_t chunk_bytes) {
  check_options(kOp, reduction, label_smoothing, z_loss, softcap);
  [[maybe_unused]] const Backend::Guard guard(hidden);
  const Options options{ignore_index, label_smoothing, z_loss, softcap, 0, 0, chunk_bytes};
  const Head head =
      prepare(hidden, weight, target, bias, class_weight, options, /*drop_ignored=*/!return_lse);
  const bool reduced = static_cast<Reduction>(reduction) != Reduction::kNone;
  // Gradients are made with the loss where they are known but for one factor.
  const bool fused = reduced && !return_lse && !return_logprobs;
  const Wanted wanted{.hidden = fused && grad_hidden,
                      .weight = fused && grad_weight,
                      .bias = fused && grad_bias && bias};
  const Plan plan = make_plan(head, wanted.any(), chunk_bytes);
  Gradients grads = allocate_gradients(head, plan, wanted);

  const int64_t N = head.N, R = head.R();
  const Tensor saved = rows_on(head, SavedRows<char>::size(N, reduced));
  // Made where they are kept, unless rows are left out.
  Tensor saved_max = narrowed(saved, 0, N), saved_sum = narrowed(saved, N, N);
  const Tensor row_max = head.kept ? rows_on(head, R) : saved_max;
  const Tensor row_sum = head.kept ? rows_on(head, R) : saved_sum;
  const Tensor norm = reduced ? narrowed(saved, 2 * N, 2) : rows_on(head, 2);
  const Tensor row_loss = rows_on(head, R);
  const Tensor row_log_sum = rows_on(head, R);
  const std::optional<Tensor> lse = return_lse ? std::optional(rows_on(head, R)) : std::nullopt;
  const std::optional<Tensor> logprobs =
      return_logprobs ? std::optional(rows_on(head, R)) : std::nullopt;
  const int64_t scalar[] = {1};
  const Tensor loss = empty_on(hidden, Sizes(scalar, reduced ? 0 : 1), head.acc);
  const Reducer reducer(head, reduction);
  const double unit = unit_gradient(head, static_cast<Reduction>(reduction));
  std::optional<Tensor> grad_loss;
  if (grads.any()) {
    // The norm depends on the targets alone, and is needed before the losses are known.
    const Tensor zeros = zeros_on(head, R);
    reducer.run(zeros, zeros, zeros, loss, norm);
    grad_loss = rows_on(head, 1);
    torch::stable::fill_(*grad_loss, unit);
  }

  if (R > 0) {
    Chunks chunks(head, plan);
    const Tensor state = rows_on(head, kStateParts * R);
    const auto finish = [&](int64_t begin, int64_t count) {
      Backend::run(
          LinearCrossEntropyFinishArgs{.rows = head.rows_from(begin, count),
                                       .state = at(state, begin),
                                       .stride = R,
                                       .add_z_loss = z_loss != 0 && !reduced,
                                       .row_loss = at(row_loss, begin),
                                       .lse = lse ? at(*lse, begin) : nullptr,
                                       .logprob = logprobs ? at(*logprobs, begin) : nullptr,
                                       .row_log_sum = at(row_log_sum, begin),
                                       .row_max = at(row_max, begin),
                                       .row_sum = at(row_sum, begin)});
    };
    const LinearCrossEntropyGradientArgs all_rows{.rows = {},
                                                  .tile = {},
                                                  .grad_loss = data(grad_loss),
                                                  .grad_loss_stride = 0,
                                                  .grad_lse = nullptr,
                                                  .grad_logprob = nullptr,
                                                  .row_max = row_max.const_data_ptr(),
                                                  .row_sum = row_sum.const_data_ptr(),
                                                  .norm = norm.const_data_ptr(),
                                                  .grad_dtype = head.acc_dtype,
                                                  .dlogits = nullptr};
    if (plan.all_tiles) {
      chunks.for_each([&](int64_t begin, int64_t count) {
        chunks.add_chunk_to_state(state.mutable_data_ptr());
        finish(begin, count);
        chunks.add_chunk_to_gradients(all_rows, grads);
      });
    } else {
      chunks.add_rows_to_state(state.mutable_data_ptr());
      finish(0, R);
      if (grads.any()) chunks.add_rows_to_gradients(all_rows, grads);
    }
  }

  if (R > 0) divide_by_unit(head, grads, unit);
  if (reduced) reducer.run(row_loss, row_max, row_log_sum, loss, norm);
  const Sizes row_sizes(hidden.sizes().data(), hidden.dim() - 1);
  const auto per_row = [&](const Tensor& t) { return reshaped(from_kept(head, t), row_sizes); };
  if (head.kept) {
    torch::stable::copy_(saved_max, from_kept(head, row_max));
    torch::stable::copy_(saved_sum, from_kept(head, row_sum));
  }
  auto [dhidden, dweight, dbias] = finished(head, grads, hidden.sizes());
  return {reduced ? loss : per_row(row_loss),
          lse ? per_row(*lse) : rows_on(head, 0),
          logprobs ? per_row(*logprobs) : rows_on(head, 0),
          saved,
          dhidden,
          dweight,
          dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_logprobs, const Tensor& hidden, const Tensor& weight,
    const Tensor& target, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& class_weight, const Tensor& saved, int64_t ignore_index,
    int64_t reduction, double label_smoothing, double z_loss, double softcap, int64_t first_class,
    int64_t num_classes, bool grad_hidden, bool grad_weight, bool grad_bias, int64_t chunk_bytes) {
  check_options(kOp, reduction, label_smoothing, z_loss, softcap);
  [[maybe_unused]] const Backend::Guard guard(hidden);
  const Options options{ignore_index, label_smoothing, z_loss,     softcap,
                        first_class,  num_classes,     chunk_bytes};
  const Head head = prepare(hidden, weight, target, bias, class_weight, options,
                            /*drop_ignored=*/!grad_lse.has_value());
  const bool reduced = static_cast<Reduction>(reduction) != Reduction::kNone;
  const auto g_loss = row_gradient(head, grad_loss, "grad_loss", reduced);
  const auto g_lse = row_gradient(head, grad_lse, "grad_lse", false);
  const auto g_logprobs = row_gradient(head, grad_logprobs, "grad_logprobs", false);
  const int64_t N = head.N;
  const int64_t expected = SavedRows<char>::size(N, reduced);
  check(saved.numel() == expected && saved.scalar_type() == head.acc && saved.is_contiguous(),
        "linear_cross_entropy_backward: saved must be ", dtype_name(head.acc), " [", expected,
        "], got ", describe(saved));
  const Tensor row_max = to_kept(head, narrowed(saved, 0, N));
  const Tensor row_sum = to_kept(head, narrowed(saved, N, N));
  const Plan plan = make_plan(head, /*all_tiles=*/false, chunk_bytes);
  Gradients grads = allocate_gradients(
      head, plan, {.hidden = grad_hidden, .weight = grad_weight, .bias = grad_bias && bias});

  if (head.R() > 0 && grads.any()) {
    Chunks(head, plan)
        .add_rows_to_gradients({.rows = {},
                                .tile = {},
                                .grad_loss = data(g_loss),
                                .grad_loss_stride = reduced ? 0 : 1,
                                .grad_lse = data(g_lse),
                                .grad_logprob = data(g_logprobs),
                                .row_max = row_max.const_data_ptr(),
                                .row_sum = row_sum.const_data_ptr(),
                                .norm = reduced ? at(saved, 2 * N) : nullptr,
                                .grad_dtype = head.acc_dtype,
                                .dlogits = nullptr},
                               grads);
  }
  return finished(head, grads, hidden.sizes());
}

Tensor linear_cross_entropy_state(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                  const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                  double label_smoothing, double softcap, int64_t first_class,
                                  int64_t num_classes, int64_t chunk_bytes) {
  check_options(kOp, 0, label_smoothing, 0, softcap);
  [[maybe_unused]] const Backend::Guard guard(hidden);
  const Options options{ignore_index, label_smoothing, 0,          softcap,
                        first_class,  num_classes,     chunk_bytes};
  const Head head =
      prepare(hidden, weight, target, bias, class_weight, options, /*drop_ignored=*/false);
  const int64_t sizes[] = {kStateParts, head.N};
  const Tensor state = empty_on(hidden, Sizes(sizes, 2), head.acc);
  if (head.N > 0) {
    Chunks(head, make_plan(head, /*all_tiles=*/false, chunk_bytes))
        .add_rows_to_state(state.mutable_data_ptr());
  }
  return state;
}

}  // namespace seqkern
