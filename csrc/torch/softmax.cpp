// ops::softmax and its backward: check, allocate, run.
#include "ops/softmax.h"

#include "torch/backend.h"
#include "torch/ops.h"

namespace seqkern {

Tensor softmax(const Tensor& x, bool log) {
  constexpr std::string_view kOp = "softmax";
  [[maybe_unused]] const Backend::Guard guard(x);
  const DType dtype = float_dtype(x, kOp, "x");
  check(x.dim() >= 1, kOp, ": x must be [..., V], got a scalar");
  const Tensor y = empty_on(x, x.sizes(), x.scalar_type());
  if (x.numel() == 0) return y;
  Backend::before_first_write(y);
  const Tensor rows = with_unit_last_stride(x);
  const int64_t V = x.size(x.dim() - 1);
  Backend::run(SoftmaxForwardArgs{.dtype = dtype,
                                  .log = log,
                                  .N = x.numel() / V,
                                  .V = V,
                                  .x = rows.const_data_ptr(),
                                  .x_rows = rows_of(rows, kOp, "x"),
                                  .y = y.mutable_data_ptr()});
  return y;
}

Tensor softmax_backward(const Tensor& dy, const Tensor& y, bool log) {
  constexpr std::string_view kOp = "softmax_backward";
  [[maybe_unused]] const Backend::Guard guard(y);
  const DType dtype = float_dtype(y, kOp, "y");
  check_same_device(y, dy, kOp, "y", "dy");
  bool same = y.dim() >= 1 && dy.dim() == y.dim() && dy.scalar_type() == y.scalar_type();
  for (int64_t d = 0; same && d < y.dim(); ++d) same = dy.size(d) == y.size(d);
  check(same, kOp, ": dy must be ", describe(y), ", got ", describe(dy));
  const Tensor dx = empty_on(y, y.sizes(), y.scalar_type());
  if (y.numel() == 0) return dx;
  Backend::before_first_write(dx);
  const Tensor dy_rows = with_unit_last_stride(dy);
  const Tensor kept = y.is_contiguous() ? y : torch::stable::contiguous(y);
  const int64_t V = y.size(y.dim() - 1);
  Backend::run(SoftmaxBackwardArgs{.dtype = dtype,
                                   .log = log,
                                   .N = y.numel() / V,
                                   .V = V,
                                   .dy = dy_rows.const_data_ptr(),
                                   .dy_rows = rows_of(dy_rows, kOp, "dy"),
                                   .y = kept.const_data_ptr(),
                                   .dx = dx.mutable_data_ptr()});
  return dx;
}

}  // namespace seqkern
