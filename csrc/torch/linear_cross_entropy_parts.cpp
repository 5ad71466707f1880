// Arguments and chunks of ops::linear_cross_entropy.
#include <array>

#include "torch/linear_cross_entropy.h"

namespace seqkern::linear_cross_entropy_parts {
namespace {

// Pieces of a product that is added to what was there.
constexpr int64_t kProductPiece = 32 << 20;

Tensor index_select(const Tensor& t, const Tensor& index) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(index)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void index_copy(const Tensor& to, const Tensor& index, const Tensor& from) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(to), torch::stable::detail::from(int64_t{0}),
      torch::stable::detail::from(index), torch::stable::detail::from(from)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_copy_", "", stack.data(), TORCH_ABI_VERSION));
  static_cast<void>(torch::stable::detail::to<Tensor>(stack[0]));
}

std::optional<Tensor> as_accumulate(const Tensor& like, const std::optional<Tensor>& t,
                                    std::string_view name, int64_t size) {
  if (!t) return t;
  check_same_device(like, *t, kOp, "hidden", name);
  check(is_floating(*t) && t->dim() == 1 && t->size(0) == size, kOp, ": ", name,
        " must be floating point [", size, "], got ", describe(*t));
  return torch::stable::contiguous(torch::stable::to(*t, accumulate_type(like)));
}

// The rows of target that are not ignored, where they are not all.
std::optional<Tensor> kept_rows(const Tensor& target, int64_t ignore_index) {
  const int64_t N = target.numel();
  const auto* y = static_cast<const int64_t*>(target.const_data_ptr());
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) count += y[n] != ignore_index;
  if (count == N) return std::nullopt;
  const int64_t sizes[] = {count};
  Tensor kept = empty_on(target, Sizes(sizes, 1), ScalarType::Long);
  auto* out = static_cast<int64_t*>(kept.mutable_data_ptr());
  for (int64_t n = 0; n < N; ++n) {
    if (y[n] != ignore_index) *out++ = n;
  }
  return kept;
}

Tensor matrix_on(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns};
  Tensor t = empty_on(like, Sizes(sizes, 2), dtype);
  Backend::before_first_write(t);
  return t;
}

// out += a b of 16-bit operands. CUDA's BLAS can, but its scalars do not pass the stable ABI with a
// result of another dtype: a piece at a time, added by a kernel.
template <class B>
void add_mixed_product(const Head& head, std::optional<Tensor>& scratch, const Tensor& out,
                       const Tensor& a, const Tensor& b) {
  if constexpr (B::kAddsMixedProducts) {
    B::multiply(out, a, b, true);
  } else {
    const int64_t columns = out.size(1);
    const int64_t rows =
        std::clamp<int64_t>(kProductPiece / (columns * item_size(head.acc)), 1, out.size(0));
    if (!scratch || scratch->numel() < rows * columns) {
      scratch = matrix_on(head.hidden, rows, columns, head.acc);
    }
    for (int64_t row = 0; row < out.size(0); row += rows) {
      const int64_t count = std::min(rows, out.size(0) - row);
      Tensor sum = rows_view(out, row, count);
      const Tensor product = matrix_view(*scratch, 0, count, columns);
      B::multiply(product, rows_view(a, row, count), b, false);
      B::run(AccumulateArgs{.acc = head.acc_dtype,
                            .numel = count * columns,
                            .factor = 1.0,
                            .x = product.const_data_ptr(),
                            .sum = sum.mutable_data_ptr()});
    }
  }
}

// The same from row n on.
LinearCrossEntropyGradientArgs from_row(LinearCrossEntropyGradientArgs args, int64_t n,
                                        int64_t item) {
  const auto skip = [](const void*& p, int64_t bytes) {
    if (p) p = static_cast<const char*>(p) + bytes;
  };
  skip(args.grad_loss, args.grad_loss_stride * n * item);
  skip(args.grad_lse, n * item);
  skip(args.grad_logprob, n * item);
  skip(args.row_max, n * item);
  skip(args.row_sum, n * item);
  return args;
}

template <class B>
void scale_in_place(const Head& head, std::optional<Tensor>& t, double factor) {
  if constexpr (!B::kAddsMixedProducts) {  // a CPU has no float16 products, and no unit but 1
    if (!t) return;
    B::run(AccumulateArgs{.acc = head.acc_dtype,
                          .numel = t->numel(),
                          .factor = factor,
                          .x = nullptr,
                          .sum = t->mutable_data_ptr()});
  }
}

}  // namespace

Head prepare(const Tensor& hidden, const Tensor& weight, const Tensor& target,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& class_weight,
             const Options& options, bool drop_ignored) {
  check(hidden.dim() >= 1, kOp, ": hidden must be [..., H], got a scalar");
  const DType dtype = float_dtype(hidden, kOp, "hidden");
  const int64_t H = hidden.size(hidden.dim() - 1);
  check(H > 0, kOp, ": hidden must have at least one feature, got ", describe(hidden));
  check_same_device(hidden, weight, kOp, "hidden", "weight");
  check(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == H &&
            weight.scalar_type() == hidden.scalar_type(),
        kOp, ": weight must be ", dtype_name(hidden.scalar_type()), " [V, ", H, "], got ",
        describe(weight));
  check_same_device(hidden, target, kOp, "hidden", "target");
  check(is_class_index(target) && leading_sizes_match(target, hidden), kOp,
        ": target must be int64, int32 or uint8 ", row_shape(hidden), ", got ", describe(target));
  check(options.chunk_bytes >= 0, kOp, ": chunk_bytes must be at least 0, got ",
        options.chunk_bytes);
  const int64_t V = options.num_classes ? options.num_classes : weight.size(0);
  check(options.first_class >= 0 && options.first_class + weight.size(0) <= V, kOp,
        ": weight must be rows of [0, ", V, "), got ", weight.size(0), " from ",
        options.first_class, " on");
  const int64_t N = hidden.numel() / H;
  const int64_t sizes[] = {N, H};
  const int64_t row_sizes[] = {N};

  Tensor rows = reshaped(hidden, Sizes(sizes, 2));
  Tensor classes = reshaped(as_classes(target), Sizes(row_sizes, 1));
  check_classes(kOp, static_cast<const int64_t*>(classes.const_data_ptr()), N, V,
                options.ignore_index);
  Head head{.acc = accumulate_type(hidden),
            .acc_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
            .dtype = dtype,
            .N = N,
            .hidden = rows,
            .weight = weight,
            .target = classes,
            .kept = {},
            .bias = as_accumulate(hidden, bias, "bias", weight.size(0)),
            .class_weight = as_accumulate(hidden, class_weight, "class_weight", V),
            .weight_sum = {},
            .rows = {},
            .first_class = options.first_class};
  if constexpr (Backend::kHostReadable) {
    if (drop_ignored) head.kept = kept_rows(classes, options.ignore_index);
    if (head.kept) head.target = index_select(classes, *head.kept);
  }
  if (head.class_weight && options.label_smoothing > 0) {
    head.weight_sum = torch::stable::sum(*head.class_weight);
  }
  head.rows = {.acc = head.acc_dtype,
               .N = head.target.numel(),
               .V = V,
               .target = static_cast<const int64_t*>(head.target.const_data_ptr()),
               .class_weight = data(head.class_weight),
               .weight_sum = data(head.weight_sum),
               .ignore_index = options.ignore_index,
               .skip_ignored = drop_ignored,
               .label_smoothing = options.label_smoothing,
               .z_loss = options.z_loss,
               .softcap = options.softcap};
  return head;
}

Tensor to_kept(const Head& head, const Tensor& t) {
  return head.kept ? index_select(t, *head.kept) : t;
}

Tensor from_kept(const Head& head, const Tensor& t) {
  if (!head.kept) return t;
  int64_t sizes[] = {head.N, t.dim() > 1 ? t.size(1) : 0};
  Tensor all = empty_on(t, Sizes(sizes, t.dim()), t.scalar_type());
  torch::stable::zero_(all);
  index_copy(all, *head.kept, t);
  return all;
}

Gradients allocate_gradients(const Head& head, const Plan& plan, const Wanted& wanted) {
  Gradients grads;
  if (wanted.hidden) grads.hidden = matrix_on(head.hidden, head.R(), head.H(), head.acc);
  if (wanted.weight) {
    // Rounded once: a tile's sum on the host, on a device a product over all rows where it is made.
    // Where each chunk adds to all of dW, the sums are kept in Acc.
    const bool whole = plan.rows >= head.R() || (Backend::kTiles && !plan.all_tiles);
    const ScalarType type = whole ? weight_gradient_type(head) : head.acc;
    grads.weight = matrix_on(head.hidden, head.V(), head.H(), type);
  }
  if (wanted.bias) {
    const int64_t sizes[] = {head.V()};
    grads.bias = empty_on(head.hidden, Sizes(sizes, 1), head.acc);
  }
  if (head.R() == 0) {
    if (wanted.weight) torch::stable::zero_(*grads.weight);
    if (wanted.bias) torch::stable::zero_(*grads.bias);
  }
  return grads;
}

ScalarType weight_gradient_type(const Head& head) {
  return head.dtype == DType::kBFloat16 ? head.hidden.scalar_type() : head.acc;
}

double unit_gradient(const Head& head, Reduction reduction) {
  if (!head.mixed() || head.dtype != DType::kFloat16 || reduction != Reduction::kMean) return 1.0;
  double unit = 1.0;
  while (unit * 2 <= static_cast<double>(head.R())) unit *= 2;
  return unit;
}

void divide_by_unit(const Head& head, Gradients& grads, double unit) {
  if (unit == 1.0) return;
  scale_in_place<Backend>(head, grads.hidden, 1.0 / unit);
  scale_in_place<Backend>(head, grads.weight, 1.0 / unit);
  scale_in_place<Backend>(head, grads.bias, 1.0 / unit);
}

// ---------------------------------------------------------------- chunks

Chunks::Chunks(const Head& head, const Plan& plan)
    : head_(head),
      plan_(plan),
      logits_(matrix_on(head.hidden, plan.rows, plan.all_tiles ? head.V() : plan.width, head.acc)) {
  if (head.mixed()) {
    dlogits_ = matrix_on(head.hidden, plan.rows, plan.width, head.hidden.scalar_type());
  } else if (head.weight.scalar_type() != head.acc) {
    weight_scratch_ = matrix_on(head.hidden, plan.width, head.H(), head.acc);
  }
}

void Chunks::enter(int64_t begin, int64_t count) {
  begin_ = begin;
  count_ = count;
  if (head_.kept) {
    hidden_ = index_select(head_.hidden, narrowed(*head_.kept, begin, count));
  } else {
    hidden_ = rows_view(head_.hidden, begin, count);
  }
  if (!head_.mixed() && hidden_->scalar_type() != head_.acc) {
    hidden_ = torch::stable::to(*hidden_, head_.acc);
  }
}

LogitsTile Chunks::tile_at(int64_t first, const Tensor& logits) const {
  const char* bias = static_cast<const char*>(data(head_.bias));
  return {.first_class = head_.first_class + first,
          .width = logits.size(1),
          .logits = logits.const_data_ptr(),
          .bias = bias ? bias + first * item_size(head_.acc) : nullptr};
}

// A tile's memory is contiguous, and tile follows tile.
Tensor Chunks::tile_memory(int64_t first, int64_t width) const {
  return matrix_view(logits_, plan_.all_tiles ? first * count_ : 0, count_, width);
}

Tensor Chunks::weight_operand(int64_t first, int64_t width) {
  const Tensor rows = rows_view(head_.weight, first, width);
  if (!weight_scratch_) return rows;
  Tensor scratch = matrix_view(*weight_scratch_, 0, width, head_.H());
  torch::stable::copy_(scratch, rows);
  return scratch;
}

void Chunks::add_chunk_to_state(void* state) {
  for (int64_t first = 0; first < head_.V(); first += plan_.width) {
    const int64_t width = std::min(plan_.width, head_.V() - first);
    add_tile_to_state(first, weight_operand(first, width), state);
  }
}

void Chunks::add_rows_to_state(void* state) {
  for (int64_t first = 0; first < head_.V(); first += plan_.width) {
    const Tensor weight = weight_operand(first, std::min(plan_.width, head_.V() - first));
    for_each([&](int64_t, int64_t) { add_tile_to_state(first, weight, state); });
  }
}

void Chunks::add_tile_to_state(int64_t first, const Tensor& weight, void* state) {
  const Tensor logits = tile_memory(first, weight.size(0));
  Backend::multiply(logits, *hidden_, transposed(weight), false);
  Backend::run(LinearCrossEntropyStateArgs{
      .rows = head_.rows_from(begin_, count_),
      .tile = tile_at(first, logits),
      .first = first == 0,
      .state = static_cast<char*>(state) + begin_ * item_size(head_.acc),
      .stride = head_.R()});
}

void Chunks::add_chunk_to_gradients(const LinearCrossEntropyGradientArgs& args, Gradients& grads) {
  const int64_t tiles = (head_.V() + plan_.width - 1) / plan_.width;
  for (int64_t i = 0; i < tiles; ++i) {
    // On the host from the last tile to the first: the last ones are still in cache. On a device
    // the last one, which may be narrow, is what is added, in the slower way, to the others.
    const int64_t first = (Backend::kTiles ? tiles - 1 - i : i) * plan_.width;
    const Tile tile = make_tile(first, i > 0, grads);
    add_part(args, tile, grads);
    finish_tile(tile, grads);
  }
}

void Chunks::add_rows_to_gradients(const LinearCrossEntropyGradientArgs& args, Gradients& grads) {
  for (int64_t first = 0; first < head_.V(); first += plan_.width) {
    const Tile tile = make_tile(first, first > 0, grads);
    for_each([&](int64_t, int64_t) { add_part(args, tile, grads); });
    finish_tile(tile, grads);
  }
}

Chunks::Tile Chunks::make_tile(int64_t first, bool continued, const Gradients& grads) {
  Tile tile{.first = first,
            .width = std::min(plan_.width, head_.V() - first),
            .weight = {},
            .dweight = {},
            .continued = continued};
  if (grads.hidden || !plan_.all_tiles) tile.weight = weight_operand(first, tile.width);
  if (grads.weight) {
    if (Backend::kTiles && grads.weight->scalar_type() != head_.acc) {
      if (!dweight_scratch_) {
        dweight_scratch_ = matrix_on(head_.hidden, plan_.width, head_.H(), head_.acc);
      }
      tile.dweight = matrix_view(*dweight_scratch_, 0, tile.width, head_.H());
    } else {
      tile.dweight = rows_view(*grads.weight, first, tile.width);
    }
  }
  return tile;
}

void Chunks::finish_tile(const Tile& tile, const Gradients& grads) const {
  if (!dweight_scratch_) return;
  Tensor rounded = rows_view(*grads.weight, tile.first, tile.width);
  torch::stable::copy_(rounded, *tile.dweight);
}

void Chunks::add_part(LinearCrossEntropyGradientArgs args, const Tile& tile, Gradients& grads) {
  const Tensor logits = tile_memory(tile.first, tile.width);
  if (!plan_.all_tiles) Backend::multiply(logits, *hidden_, transposed(tile.weight), false);
  Tensor dlogits = dlogits_ ? matrix_view(*dlogits_, 0, count_, tile.width) : logits;
  args = from_row(args, begin_, item_size(head_.acc));
  args.rows = head_.rows_from(begin_, count_);
  args.tile = tile_at(tile.first, logits);
  args.grad_dtype = dlogits_ ? head_.dtype : head_.acc_dtype;
  args.dlogits = dlogits.mutable_data_ptr();
  Backend::run(args);
  if (grads.hidden) {
    accumulate(rows_view(*grads.hidden, begin_, count_), dlogits, tile.weight, tile.continued);
  }
  if (grads.weight) accumulate(*tile.dweight, transposed(dlogits), *hidden_, begin_ != 0);
  if (grads.bias) {
    Tensor sums = narrowed(*grads.bias, tile.first, tile.width);
    Backend::run(ColumnSumsArgs{.dtype = args.grad_dtype,
                                .N = count_,
                                .width = tile.width,
                                .x = dlogits.const_data_ptr(),
                                .first = begin_ == 0,
                                .sum = sums.mutable_data_ptr()});
  }
}

void Chunks::accumulate(const Tensor& out, const Tensor& a, const Tensor& b, bool continued) {
  if (head_.mixed() && continued) {
    add_mixed_product<Backend>(head_, product_scratch_, out, a, b);
  } else {
    Backend::multiply(out, a, b, continued);
  }
}

}  // namespace seqkern::linear_cross_entropy_parts
