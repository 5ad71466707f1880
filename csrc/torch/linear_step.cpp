// ops::linear_step: check, allocate, run.
#include "ops/linear_step.h"

#include "torch/backend.h"
#include "torch/ops.h"
#include "torch/scratch.h"

namespace seqkern {
namespace {

constexpr std::string_view kOp = "linear_step";

// A parameter of `size` elements, of the weight's dtype.
Tensor vector_of(const Tensor& weight, const Tensor& t, std::string_view name, int64_t size) {
  check(t.dim() == 1 && t.size(0) == size && t.scalar_type() == weight.scalar_type(), kOp, ": ",
        name, " must be ", dtype_name(weight.scalar_type()), " [", size, "] like weight, got ",
        describe(t));
  check_same_device(weight, t, kOp, "weight", name);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace

Tensor linear_step(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   int64_t norm, const std::optional<Tensor>& norm_weight,
                   const std::optional<Tensor>& norm_bias, double eps, int64_t activation,
                   bool gated, const std::optional<Tensor>& residual) {
  [[maybe_unused]] const Backend::Guard guard(x);
  check(x.dim() >= 1, kOp, ": x must be [..., K], got ", describe(x));
  const DType dtype = float_dtype(x, kOp, "x");
  check(weight.dim() == 2, kOp, ": weight must be [M, K], got ", describe(weight));
  const int64_t K = x.size(x.dim() - 1), R = weight.size(0);
  const DType weight_dtype = float_dtype(weight, kOp, "weight");
  check(weight_dtype == dtype || (dtype == DType::kFloat32 && weight_dtype != DType::kFloat64), kOp,
        ": weight must be ", dtype_name(x.scalar_type()),
        dtype == DType::kFloat32 ? ", bfloat16 or float16" : "", " with x ",
        dtype_name(x.scalar_type()), ", got ", describe(weight));
  check(K >= 1 && weight.size(1) == K, kOp, ": weight must be [M, ", K, "] with x ", shape_name(x),
        ", got ", describe(weight));
  check(K == 1 || weight.stride(1) == 1, kOp,
        ": weight must have stride 1 in its last dimension, got ", weight.stride(1));
  check_same_device(x, weight, kOp, "x", "weight");
  check(!gated || R % 2 == 0, kOp, ": weight must have an even number of rows where gated, got ",
        describe(weight));
  check(norm >= 0 && norm <= static_cast<int64_t>(StepNorm::kRmsNorm), kOp,
        ": norm must be 0, 1 or 2, got ", norm);
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::kRelu), kOp,
        ": activation must be 0 to 4, got ", activation);
  check(eps >= 0, kOp, ": eps must be at least 0, got ", eps);
  const auto kind = static_cast<StepNorm>(norm);
  check(kind != StepNorm::kNone || (!norm_weight && !norm_bias), kOp,
        ": norm must be given with norm_weight or norm_bias, got none");
  check(kind == StepNorm::kLayerNorm || !norm_bias, kOp,
        ": norm_bias must be none without a layer norm, got one");
  const int64_t M = gated ? R / 2 : R;
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end() - 1);
  size.push_back(M);
  const Sizes shape(size.data(), size.size());
  if (residual) {
    check(residual->scalar_type() == x.scalar_type() && residual->sizes().equals(shape), kOp,
          ": residual must be ", dtype_name(x.scalar_type()), " of the result's shape, [..., ", M,
          "] with x ", shape_name(x), ", got ", describe(*residual));
    check_same_device(x, *residual, kOp, "x", "residual");
  }
  const Tensor y = empty_on(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  Backend::before_first_write(y);

  const auto vector = [&](const std::optional<Tensor>& t, std::string_view name, int64_t elements) {
    return t ? std::optional<Tensor>(vector_of(weight, *t, name, elements)) : t;
  };
  const auto b = vector(bias, "bias", R), nw = vector(norm_weight, "norm_weight", K),
             nb = vector(norm_bias, "norm_bias", K);
  const Tensor in = with_unit_last_stride(x);
  const Tensor beside = residual ? with_unit_last_stride(*residual) : x;
  LinearStepArgs args{.dtype = dtype,
                      .weight_dtype = weight_dtype,
                      .N = x.numel() / K,
                      .K = K,
                      .M = M,
                      .x = in.const_data_ptr(),
                      .x_rows = rows_of(in, kOp, "x"),
                      .norm = kind,
                      .norm_weight = data(nw),
                      .norm_bias = data(nb),
                      .eps = eps,
                      .weight = weight.const_data_ptr(),
                      .weight_stride = weight.stride(0),
                      .bias = data(b),
                      .activation = static_cast<Activation>(activation),
                      .gated = gated,
                      .residual = residual ? beside.const_data_ptr() : nullptr,
                      .residual_rows = residual ? rows_of(beside, kOp, "residual") : Rows{},
                      .y = y.mutable_data_ptr(),
                      .workspace = nullptr};
  const Scratch scratch(x, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Backend::run(args);
  return y;
}

}  // namespace seqkern
