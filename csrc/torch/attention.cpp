// ops::attention and its backward: check, allocate, run.
#include "ops/attention.h"

#include "torch/backend.h"
#include "torch/ops.h"
#include "torch/scratch.h"

namespace seqkern {
namespace {

constexpr std::string_view kOp = "attention";
constexpr int64_t kMaxD = 256;

struct Options {
  double scale;
  int64_t window;
  double softcap;
  double dropout_p;
};

// The tensors of a call, and the ones made for them (kept alive as long as the pointers).
struct Inputs {
  AttentionInputs args;
  Tensor q, k, v;
  std::optional<Tensor> lengths, cu_seqlens, alibi_slopes, seed;
};

HeadStrides head_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

void check_options(const Options& o) {
  check(o.window >= 0, kOp, ": window must be at least 0, got ", o.window);
  check_softcap(kOp, o.softcap);
  check(o.dropout_p >= 0 && o.dropout_p < 1, kOp, ": dropout_p must be in [0, 1), got ",
        o.dropout_p);
  check(o.scale == o.scale, kOp, ": scale must be a number, got ", o.scale);
}

// int32 or int64 [n] as contiguous int64.
template <class Shape>
Tensor index_tensor(const Tensor& t, std::string_view name, const Shape& shape, bool fits,
                    const Tensor& q) {
  const ScalarType type = t.scalar_type();
  check(fits && (type == ScalarType::Long || type == ScalarType::Int), kOp, ": ", name,
        " must be int64 or int32 ", shape, ", got ", describe(t));
  check_same_device(q, t, kOp, "q", name);
  const Tensor wide = type == ScalarType::Long ? t : torch::stable::to(t, ScalarType::Long);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

void check_lengths(const AttentionInputs& in) {
  if constexpr (Backend::kHostReadable) {
    for (int64_t b = 0; b < in.B; ++b) {
      check(in.lengths[b] >= 0 && in.lengths[b] <= in.Tk, kOp, ": lengths must be in [0, ", in.Tk,
            "], got ", in.lengths[b], " at row ", b);
    }
  }
}

void check_cu_seqlens(const AttentionInputs& in) {
  if constexpr (Backend::kHostReadable) {
    for (int64_t s = 0; s <= in.S; ++s) {
      const int64_t low = s ? in.cu_seqlens[s - 1] : 0;
      check(in.cu_seqlens[s] >= low && in.cu_seqlens[s] <= in.Tk, kOp,
            ": cu_seqlens must not decrease, from 0 or more to at most ", in.Tk, ", got ",
            in.cu_seqlens[s], " at ", s);
    }
  }
}

void check_packed(Inputs& inputs, const std::optional<Tensor>& lengths) {
  AttentionInputs& in = inputs.args;
  if (lengths) {
    throw_value_error(
        message(kOp, ": lengths must be None with cu_seqlens, got ", describe(*lengths)));
  }
  check(in.B == 1, kOp, ": q must be [1, NH, N, D] with cu_seqlens, got ", describe(inputs.q));
  check(in.Tq == in.Tk, kOp, ": k must have the ", in.Tq, " tokens of q with cu_seqlens, got ",
        describe(inputs.k));
}

Inputs prepare(const Tensor& q, const Tensor& k, const Tensor& v,
               const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens,
               const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed,
               const Options& o) {
  check_options(o);
  check(q.dim() == 4, kOp, ": q must be [B, NH, Tq, D], got ", describe(q));
  const DType dtype = float_dtype(q, kOp, "q");
  const int64_t B = q.size(0), NH = q.size(1), Tq = q.size(2), D = q.size(3);
  check(D >= 1 && D <= kMaxD, kOp, ": q must have a head width from 1 to ", kMaxD, ", got ",
        describe(q));
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.scalar_type() == q.scalar_type() && t.size(0) == B && t.size(3) == D;
  };
  check(fits(k), kOp, ": k must be ", dtype_name(q.scalar_type()), " [", B, ", NKV, Tk, ", D,
        "], got ", describe(k));
  const int64_t NKV = k.size(1), Tk = k.size(2);
  check(NH == 0 || (NKV > 0 && NH % NKV == 0), kOp,
        ": k must have a number of heads that divides the ", NH, " of q, got ", describe(k));
  check(Tq <= Tk, kOp, ": k must have at least the ", Tq, " positions of q, got ", describe(k));
  check(fits(v) && v.size(1) == NKV && v.size(2) == Tk, kOp, ": v must be ",
        dtype_name(q.scalar_type()), " ", shape_name(k), ", got ", describe(v));
  check(Tk < (int64_t{1} << 31), kOp, ": k must have less than 2^31 positions, got ", describe(k));
  check_same_device(q, k, kOp, "q", "k");
  check_same_device(q, v, kOp, "q", "v");

  Inputs inputs{.args = {},
                .q = with_unit_last_stride(q),
                .k = with_unit_last_stride(k),
                .v = with_unit_last_stride(v),
                .lengths = {},
                .cu_seqlens = {},
                .alibi_slopes = {},
                .seed = {}};
  AttentionInputs& in = inputs.args;
  in = {.dtype = dtype,
        .B = B,
        .NH = NH,
        .NKV = NKV,
        .Tq = Tq,
        .Tk = Tk,
        .D = D,
        .q = inputs.q.const_data_ptr(),
        .k = inputs.k.const_data_ptr(),
        .v = inputs.v.const_data_ptr(),
        .q_strides = head_strides(inputs.q),
        .k_strides = head_strides(inputs.k),
        .v_strides = head_strides(inputs.v),
        .lengths = nullptr,
        .cu_seqlens = nullptr,
        .S = 0,
        .scale = o.scale,
        .window = o.window,
        .softcap = o.softcap,
        .alibi_slopes = nullptr,
        .alibi_batch_stride = 0,
        .dropout_p = o.dropout_p,
        .seed = nullptr};

  if (cu_seqlens) {
    check_packed(inputs, lengths);
    inputs.cu_seqlens = index_tensor(*cu_seqlens, "cu_seqlens", "[S + 1]",
                                     cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, q);
    in.cu_seqlens = static_cast<const int64_t*>(data(inputs.cu_seqlens));
    in.S = inputs.cu_seqlens->size(0) - 1;
    check_cu_seqlens(in);
  }
  if (lengths) {
    inputs.lengths = index_tensor(*lengths, "lengths", shape_name({B}),
                                  lengths->dim() == 1 && lengths->size(0) == B, q);
    in.lengths = static_cast<const int64_t*>(data(inputs.lengths));
    check_lengths(in);
  }
  if (alibi_slopes) {
    const Tensor& slopes = *alibi_slopes;
    const bool rows = slopes.dim() == 2 && slopes.size(0) == B && slopes.size(1) == NH;
    check(rows || (slopes.dim() == 1 && slopes.size(0) == NH), kOp,
          ": alibi_slopes must be floating point [", NH, "] or [", B, ", ", NH, "], got ",
          describe(slopes));
    float_dtype(slopes, kOp, "alibi_slopes");
    check_same_device(q, slopes, kOp, "q", "alibi_slopes");
    inputs.alibi_slopes = torch::stable::contiguous(torch::stable::to(slopes, ScalarType::Float));
    in.alibi_slopes = static_cast<const float*>(data(inputs.alibi_slopes));
    in.alibi_batch_stride = rows ? NH : 0;
  }
  if (o.dropout_p > 0) {
    check(seed.has_value(), kOp, ": dropout_seed must be int64 [1] with dropout_p > 0, got none");
    check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, kOp,
          ": dropout_seed must be int64 [1], got ", describe(*seed));
    check_same_device(q, *seed, kOp, "q", "dropout_seed");
    inputs.seed = *seed;
    in.seed = static_cast<const int64_t*>(data(inputs.seed));
  }
  return inputs;
}

// [B, heads, T, D] that lies in memory as [B, T, heads, D].
Tensor empty_heads(const Tensor& like) {
  const int64_t B = like.size(0), heads = like.size(1), T = like.size(2), D = like.size(3);
  const int64_t sizes[] = {B, heads, T, D};
  const int64_t strides[] = {T * heads * D, D, heads * D, 1};
  return empty_strided_on(like, Sizes(sizes, 4), strides, like.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& lengths,
                                     const std::optional<Tensor>& cu_seqlens,
                                     const std::optional<Tensor>& alibi_slopes,
                                     const std::optional<Tensor>& seed, double scale,
                                     int64_t window, double softcap, double dropout_p) {
  [[maybe_unused]] const Backend::Guard guard(q);
  const Inputs inputs = prepare(q, k, v, lengths, cu_seqlens, alibi_slopes, seed,
                                {scale, window, softcap, dropout_p});
  Tensor out = empty_heads(q);
  Tensor lse = empty_on(q, Sizes(q.sizes().data(), 3), accumulate_type(q));
  if (lse.numel() > 0) {
    AttentionForwardArgs args{.in = inputs.args,
                              .out = out.mutable_data_ptr(),
                              .out_strides = head_strides(out),
                              .lse = lse.mutable_data_ptr(),
                              .workspace = nullptr};
    const Scratch scratch(q, Backend::workspace_bytes(args));
    args.workspace = scratch.data();
    Backend::run(args);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const std::optional<Tensor>& dout, const std::optional<Tensor>& dlse, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, double scale,
    int64_t window, double softcap, double dropout_p) {
  constexpr std::string_view kBackward = "attention_backward";
  [[maybe_unused]] const Backend::Guard guard(q);
  const Inputs inputs = prepare(q, k, v, lengths, cu_seqlens, alibi_slopes, seed,
                                {scale, window, softcap, dropout_p});
  // `like` has the dtype and shape that `t` must have.
  const auto checked = [&](const Tensor& t, std::string_view name, ScalarType type, int64_t dims) {
    bool fits = t.dim() == dims && t.scalar_type() == type;
    for (int64_t d = 0; fits && d < dims; ++d) fits = t.size(d) == q.size(d);
    check(fits, kBackward, ": ", name, " must be ", dtype_name(type), " with the sizes of ",
          shape_name(q), ", got ", describe(t));
    check_same_device(q, t, kBackward, "q", name);
    if (dims == 4) return with_unit_last_stride(t);
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  const Tensor kept_out = checked(out, "out", q.scalar_type(), 4);
  const Tensor kept_lse = checked(lse, "lse", accumulate_type(q), 3);
  std::optional<Tensor> g_out, g_lse;
  if (dout) g_out = checked(*dout, "dout", q.scalar_type(), 4);
  if (dlse) g_lse = checked(*dlse, "dlse", accumulate_type(q), 3);

  Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  // Without a query the keys still get gradients: zeros, which the kernel writes.
  if (dk.numel() > 0) {
    AttentionBackwardArgs args{.in = inputs.args,
                               .out = kept_out.const_data_ptr(),
                               .out_strides = head_strides(kept_out),
                               .lse = kept_lse.const_data_ptr(),
                               .dout = data(g_out),
                               .dout_strides = g_out ? head_strides(*g_out) : HeadStrides{},
                               .dlse = data(g_lse),
                               .dq = dq.mutable_data_ptr(),
                               .dk = dk.mutable_data_ptr(),
                               .dv = dv.mutable_data_ptr(),
                               .dq_strides = head_strides(dq),
                               .dk_strides = head_strides(dk),
                               .dv_strides = head_strides(dv),
                               .workspace = nullptr};
    const Scratch scratch(q, Backend::workspace_bytes(args));
    args.workspace = scratch.data();
    Backend::run(args);
  }
  return {dq, dk, dv};
}

}  // namespace seqkern
