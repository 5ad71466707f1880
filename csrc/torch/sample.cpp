// ops::sample: check, allocate, run.
#include "ops/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "torch/backend.h"
#include "torch/ops.h"
#include "torch/scratch.h"

namespace seqkern {
namespace {

constexpr std::string_view kOp = "sample";

// An option that may be a tensor [B]: that tensor in the contract's type, kept alive with the
// pointers.
template <class X>
struct Option {
  PerRow<X> args;
  std::optional<Tensor> rows;

  // `valid` and `range` (its words) hold for each value; those on the device are not looked at.
  template <class Valid>
  Option(const Tensor& logits, std::string_view name, X value, const std::optional<Tensor>& given,
         Valid valid, std::string_view range)
      : args{value, nullptr} {
    if (!given) {
      check(valid(value), kOp, ": ", name, " must be ", range, ", got ", value);
      return;
    }
    const int64_t B = logits.size(0);
    constexpr bool kInteger = std::is_same_v<X, int64_t>;
    check_same_device(logits, *given, kOp, "logits", name);
    const ScalarType type = given->scalar_type();
    const bool integer = type == ScalarType::Long || type == ScalarType::Int;
    check(given->dim() == 1 && given->size(0) == B &&
              (integer || (!kInteger && (type == ScalarType::Double || type == ScalarType::Float))),
          kOp, ": ", name,
          kInteger ? " must be a number or int64 [" : " must be a number or float [", B, "], got ",
          describe(*given));
    rows = torch::stable::contiguous(
        torch::stable::to(*given, kInteger ? ScalarType::Long : ScalarType::Double));
    args.rows = static_cast<const X*>(rows->const_data_ptr());
    if constexpr (Backend::kHostReadable) {
      for (int64_t b = 0; b < B; ++b) {
        check(valid(args.rows[b]), kOp, ": ", name, " must be ", range, ", got ", args.rows[b],
              " for row ", b);
      }
    }
  }
};

// What is wrong with a row for which there is no distribution.
std::string fault_of(const Tensor& logits, int64_t row) {
  const Tensor numbers = torch::stable::contiguous(
      torch::stable::to(torch::stable::select(logits, 0, row), ScalarType::Double));
  const auto* x = static_cast<const double*>(numbers.const_data_ptr());
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t v = 0; v < logits.size(1); ++v) {
    if (std::isnan(x[v])) return "NaN";
    most = std::max(most, x[v]);
  }
  return std::isfinite(most) ? "penalties that leave none" : message("a maximum of ", most);
}

}  // namespace

std::tuple<Tensor, Tensor> sample(
    const Tensor& logits, const std::optional<Tensor>& token_counts, double temperature,
    int64_t top_k, double top_p, double min_p, double repetition_penalty, double presence_penalty,
    double frequency_penalty, int64_t seed, int64_t step,
    const std::optional<Tensor>& temperature_rows, const std::optional<Tensor>& top_k_rows,
    const std::optional<Tensor>& top_p_rows, const std::optional<Tensor>& min_p_rows,
    const std::optional<Tensor>& repetition_penalty_rows,
    const std::optional<Tensor>& presence_penalty_rows,
    const std::optional<Tensor>& frequency_penalty_rows, const std::optional<Tensor>& seed_rows,
    const std::optional<Tensor>& step_rows, bool model_logprob) {
  [[maybe_unused]] const Backend::Guard guard(logits);
  const DType dtype = float_dtype(logits, kOp, "logits");
  check(logits.dim() == 2 && logits.size(1) > 0, kOp, ": logits must be [B, V], got ",
        describe(logits));
  const int64_t B = logits.size(0), V = logits.size(1);
  const auto positive = [](double x) { return x > 0 && std::isfinite(x); };
  const auto not_negative = [](double x) { return x >= 0 && std::isfinite(x); };
  const auto finite = [](double x) { return std::isfinite(x); };
  const auto any = [](int64_t) { return true; };
  const Option<double> temperatures(logits, "temperature", temperature, temperature_rows,
                                    not_negative, "at least 0 and finite");
  const Option<int64_t> top_ks(
      logits, "top_k", top_k, top_k_rows, [](int64_t k) { return k >= 0; },
      "at least 0 (0: all tokens)");
  const Option<double> top_ps(
      logits, "top_p", top_p, top_p_rows, [](double p) { return p > 0 && p <= 1; }, "in (0, 1]");
  const Option<double> min_ps(
      logits, "min_p", min_p, min_p_rows, [](double p) { return p >= 0 && p <= 1; }, "in [0, 1]");
  const Option<double> repetition(logits, "repetition_penalty", repetition_penalty,
                                  repetition_penalty_rows, positive, "above 0 and finite");
  const Option<double> presence(logits, "presence_penalty", presence_penalty, presence_penalty_rows,
                                finite, "finite");
  const Option<double> frequency(logits, "frequency_penalty", frequency_penalty,
                                 frequency_penalty_rows, finite, "finite");
  const Option<int64_t> seeds(logits, "seed", seed, seed_rows, any, "an integer");
  const Option<int64_t> steps(logits, "step", step, step_rows, any, "an integer");

  const bool penalised = repetition.rows || presence.rows || frequency.rows ||
                         repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  check(token_counts || !penalised, kOp, ": token_counts must be given for penalties, int32 [", B,
        ", ", V, "], got none");
  Tensor counts = logits;
  if (token_counts) {
    check_same_device(logits, *token_counts, kOp, "logits", "token_counts");
    const ScalarType type = token_counts->scalar_type();
    check((type == ScalarType::Int || type == ScalarType::Long) && token_counts->dim() == 2 &&
              token_counts->size(0) == B && token_counts->size(1) == V,
          kOp, ": token_counts must be int32 [", B, ", ", V, "], got ", describe(*token_counts));
    if (penalised) {
      counts = torch::stable::contiguous(torch::stable::to(*token_counts, ScalarType::Int));
    }
  }
  const Tensor x = V == 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
  const int64_t sizes[] = {B};
  Tensor tokens = empty_on(logits, Sizes(sizes, 1), ScalarType::Long);
  Tensor logprobs = empty_on(logits, Sizes(sizes, 1), ScalarType::Float);
  if (B == 0) return {tokens, logprobs};
  SampleArgs args{
      .dtype = dtype,
      .B = B,
      .V = V,
      .logits = x.const_data_ptr(),
      .logits_rows = rows_of(x, kOp, "logits"),
      .token_counts = penalised ? static_cast<const int32_t*>(counts.const_data_ptr()) : nullptr,
      .temperature = temperatures.args,
      .top_k = top_ks.args,
      .top_p = top_ps.args,
      .min_p = min_ps.args,
      .repetition_penalty = repetition.args,
      .presence_penalty = presence.args,
      .frequency_penalty = frequency.args,
      .seed = seeds.args,
      .step = steps.args,
      .model_logprob = model_logprob,
      .token = static_cast<int64_t*>(tokens.mutable_data_ptr()),
      .logprob = static_cast<float*>(logprobs.mutable_data_ptr()),
      .workspace = nullptr};
  const Scratch scratch(logits, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Backend::run(args);
  if constexpr (Backend::kHostReadable) {
    for (int64_t b = 0; b < B; ++b) {
      if (args.token[b] >= 0) continue;
      throw_value_error(message(kOp,
                                ": logits must have a finite maximum and no NaN in each row, got ",
                                fault_of(logits, b), " in row ", b));
    }
  }
  return {tokens, logprobs};
}

}  // namespace seqkern
