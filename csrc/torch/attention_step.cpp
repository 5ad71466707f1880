// ops::attention_step: check, allocate, run.
#include "ops/attention_step.h"

#include "torch/backend.h"
#include "torch/ops.h"
#include "torch/scratch.h"

namespace seqkern {
namespace {

constexpr std::string_view kOp = "attention_step";
constexpr int64_t kMaxD = 256;

HeadStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

void check_heads(const Tensor& t, std::string_view name, ScalarType dtype, int64_t B, int64_t heads,
                 int64_t T, int64_t D) {
  check(t.dim() == 4 && t.scalar_type() == dtype && t.size(0) == B && t.size(1) == heads &&
            t.size(2) == T && t.size(3) == D,
        kOp, ": ", name, " must be ", dtype_name(dtype), " [", B, ", ", heads, ", ", T, ", ", D,
        "], got ", describe(t));
}

void check_rotary(const Tensor& q, const Tensor& t, std::string_view name, int64_t positions,
                  int64_t half) {
  check(t.dim() == 2 && t.scalar_type() == ScalarType::Float && t.size(0) >= positions &&
            t.size(1) == half && t.is_contiguous(),
        kOp, ": ", name, " must be contiguous float32 [at least ", positions, ", ", half, "], got ",
        describe(t));
  check_same_device(q, t, kOp, "q", name);
}

}  // namespace

Tensor attention_step(const Tensor& q, const Tensor& k_new, const Tensor& v_new,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                      bool interleaved, double scale, int64_t window, double softcap,
                      const std::optional<Tensor>& counters) {
  [[maybe_unused]] const Backend::Guard guard(q);
  check(q.dim() == 4, kOp, ": q must be [B, NH, S, D], got ", describe(q));
  const DType dtype = float_dtype(q, kOp, "q");
  const ScalarType type = q.scalar_type();
  const int64_t B = q.size(0), NH = q.size(1), S = q.size(2), D = q.size(3);
  check(S >= 1 && S <= kMaxStepTokens, kOp, ": q must hold 1 to ", kMaxStepTokens,
        " new tokens, got ", describe(q));
  check(D >= 1 && D <= kMaxD, kOp, ": q must have a head width from 1 to ", kMaxD, ", got ",
        describe(q));
  check(k_new.dim() == 4, kOp, ": k_new must be [B, NKV, S, D], got ", describe(k_new));
  const int64_t NKV = k_new.size(1);
  check_heads(k_new, "k_new", type, B, NKV, S, D);
  check_heads(v_new, "v_new", type, B, NKV, S, D);
  check(NKV > 0 && NH % NKV == 0, kOp, ": k_new must have a number of heads that divides the ", NH,
        " of q, got ", describe(k_new));
  check(k_cache.dim() == 4, kOp, ": k_cache must be [B, NKV, L, D], got ", describe(k_cache));
  const int64_t L = k_cache.size(2);
  const DType cache_dtype = float_dtype(k_cache, kOp, "k_cache");
  check(cache_dtype == dtype || (dtype == DType::kFloat32 && cache_dtype != DType::kFloat64), kOp,
        ": k_cache must be ", dtype_name(type),
        dtype == DType::kFloat32 ? ", bfloat16 or float16" : "", ", got ", describe(k_cache));
  check_heads(k_cache, "k_cache", k_cache.scalar_type(), B, NKV, L, D);
  check(B == 0 || L >= S, kOp, ": k_cache must hold at least the ", S, " new tokens, got ",
        describe(k_cache));
  check_heads(v_cache, "v_cache", k_cache.scalar_type(), B, NKV, L, D);
  for (const auto& [cache, name] :
       {std::pair(&k_cache, "k_cache"), std::pair(&v_cache, "v_cache")}) {
    check(D == 1 || cache->stride(3) == 1, kOp, ": ", name,
          " must have stride 1 in its last dimension, got ", cache->stride(3));
    check_same_device(q, *cache, kOp, "q", name);
  }
  check_same_device(q, k_new, kOp, "q", "k_new");
  check_same_device(q, v_new, kOp, "q", "v_new");
  check(window >= 0, kOp, ": window must be at least 0, got ", window);
  check_softcap(kOp, softcap);
  check(
      positions.dim() == 1 && positions.size(0) == B && positions.scalar_type() == ScalarType::Long,
      kOp, ": positions must be int64 [", B, "], got ", describe(positions));
  check_same_device(q, positions, kOp, "q", "positions");
  const Tensor where = positions.is_contiguous() ? positions : torch::stable::contiguous(positions);
  const auto* p = static_cast<const int64_t*>(where.const_data_ptr());
  if constexpr (Backend::kHostReadable) {
    for (int64_t b = 0; b < B; ++b) {
      check(p[b] >= 0 && p[b] + S <= L, kOp, ": positions must be in [0, ", L - S, "] for ", S,
            " new tokens in a cache of ", L, ", got ", p[b], " for row ", b);
    }
  }
  int64_t R = 0;
  check(cos.has_value() == sin.has_value(), kOp, ": rotary must be a pair (cos, sin), got one");
  if (cos) {
    check(cos->dim() == 2 && cos->size(1) >= 1 && 2 * cos->size(1) <= D, kOp,
          ": cos must be [positions, R / 2] with R at most ", D, ", got ", describe(*cos));
    R = 2 * cos->size(1);
    check_rotary(q, *cos, "cos", L, R / 2);
    check_rotary(q, *sin, "sin", L, R / 2);
  }

  // In memory [B, S, NH, D]: what the output projection reads.
  const ContiguousStrides memory(Sizes({B, S, NH, D}));
  const int64_t strides[] = {memory.of[0], memory.of[2], memory.of[1], memory.of[3]};
  const Tensor out = empty_strided_on(q, q.sizes(), strides, type);
  if (B == 0 || NH == 0) return out;
  const Tensor query = with_unit_last_stride(q), key = with_unit_last_stride(k_new),
               value = with_unit_last_stride(v_new);
  AttentionStepArgs args{.dtype = dtype,
                         .cache_dtype = cache_dtype,
                         .B = B,
                         .NH = NH,
                         .NKV = NKV,
                         .S = S,
                         .D = D,
                         .L = L,
                         .q = query.const_data_ptr(),
                         .k_new = key.const_data_ptr(),
                         .v_new = value.const_data_ptr(),
                         .q_strides = strides_of(query),
                         .k_new_strides = strides_of(key),
                         .v_new_strides = strides_of(value),
                         .k_cache = k_cache.mutable_data_ptr(),
                         .v_cache = v_cache.mutable_data_ptr(),
                         .k_cache_strides = strides_of(k_cache),
                         .v_cache_strides = strides_of(v_cache),
                         .positions = p,
                         .cos = cos ? static_cast<const float*>(cos->const_data_ptr()) : nullptr,
                         .sin = sin ? static_cast<const float*>(sin->const_data_ptr()) : nullptr,
                         .R = R,
                         .interleaved = interleaved,
                         .scale = scale,
                         .window = window,
                         .softcap = softcap,
                         .out = out.mutable_data_ptr(),
                         .out_strides = strides_of(out),
                         .workspace = nullptr,
                         .counters = nullptr};
  const Scratch scratch(q, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Tensor zeros = q;
  if constexpr (!Backend::kHostReadable) {
    if (counters) {
      check(counters->scalar_type() == ScalarType::Int && counters->numel() >= B * NKV &&
                counters->is_contiguous(),
            kOp, ": counters must be contiguous int32 with at least ", B * NKV,
            " elements, all zero, got ", describe(*counters));
      check_same_device(q, *counters, kOp, "q", "counters");
      zeros = *counters;
    } else {
      const int64_t count[] = {B * NKV};
      zeros = empty_on(q, Sizes(count, 1), ScalarType::Int);
      torch::stable::zero_(zeros);
    }
    args.counters = static_cast<int32_t*>(zeros.mutable_data_ptr());
  }
  Backend::run(args);
  return out;
}

}  // namespace seqkern
