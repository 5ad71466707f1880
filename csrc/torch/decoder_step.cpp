// ops::decoder_step: the blocks of a transformer one after the other, each as the kernels of
// linear_step and attention_step. One call for all of them: of a small model's step, calls of
// single ops are the larger part.
#include <cmath>
#include <vector>

#include "ops/linear_step.h"
#include "torch/backend.h"
#include "torch/ops.h"

namespace seqkern {
namespace {

constexpr std::string_view kOp = "decoder_step";
constexpr size_t kOfBlock = 12;  // parameters: weight and bias of two norms and four layers

// The memory of `t` from its element `offset` on, as another shape.
Tensor view_of(const Tensor& t, int64_t offset, Sizes size, const int64_t* stride) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(size.size()),
                                                        size.data(), stride, offset, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor decoder_step(const Tensor& x, const std::vector<Tensor>& parameters, const Tensor& cache,
                    const Tensor& lengths, const std::optional<Tensor>& counters, double eps,
                    int64_t activation) {
  check(x.dim() == 3, kOp, ": x must be [B, S, C], got ", describe(x));
  const int64_t B = x.size(0), S = x.size(1), C = x.size(2);
  check(cache.dim() == 6 && cache.size(1) == 2 && cache.size(2) == B &&
            cache.size(3) * cache.size(5) == C,
        kOp, ": cache must be [layers, 2, ", B, ", NH, L, D] with NH D = ", C, ", got ",
        describe(cache));
  const int64_t layers = cache.size(0), NH = cache.size(3), L = cache.size(4), D = cache.size(5);
  check(parameters.size() == kOfBlock * static_cast<size_t>(layers), kOp,
        ": parameters must be 12 for each of ", layers, " layers, got ", parameters.size());

  const int64_t kv_size[] = {B, NH, L, D};
  const int64_t kv_stride[] = {cache.stride(2), cache.stride(3), cache.stride(4), cache.stride(5)};
  const int64_t head_size[] = {B, NH, S, D}, head_stride[] = {S * 3 * C, D, 3 * C, 1};
  const int64_t row_size[] = {B, S, C}, row_stride[] = {S * C, C, 1};
  const Sizes heads(head_size, 4), keys(kv_size, 4);
  constexpr auto kLayerNorm = static_cast<int64_t>(StepNorm::kLayerNorm);
  Tensor stream = x;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor* p = parameters.data() + kOfBlock * static_cast<size_t>(layer);
    const auto normed = [&](const Tensor* norm, const Tensor* linear, int64_t act) {
      return linear_step(stream, linear[0], linear[1], kLayerNorm, norm[0], norm[1], eps, act,
                         false, std::nullopt);
    };
    const auto added = [&](const Tensor& from, const Tensor* linear) {
      return linear_step(from, linear[0], linear[1], 0, std::nullopt, std::nullopt, 0, 0, false,
                         stream);
    };
    const Tensor qkv = normed(p, p + 2, 0);  // [B, S, 3 C]
    check(qkv.size(2) == 3 * C, kOp, ": parameters[", kOfBlock * static_cast<size_t>(layer) + 2,
          "] must be [", 3 * C, ", ", C, "], got ", describe(p[2]));
    const Tensor y = attention_step(
        view_of(qkv, 0, heads, head_stride), view_of(qkv, C, heads, head_stride),
        view_of(qkv, 2 * C, heads, head_stride),
        view_of(cache, layer * cache.stride(0), keys, kv_stride),
        view_of(cache, layer * cache.stride(0) + cache.stride(1), keys, kv_stride), lengths,
        std::nullopt, std::nullopt, false, 1 / std::sqrt(static_cast<double>(D)), 0, 0, counters);
    // [B, NH, S, D] lies in memory as [B, S, NH, D].
    stream = added(view_of(y, 0, Sizes(row_size, 3), row_stride), p + 4);
    stream = added(normed(p + 6, p + 8, activation), p + 10);
  }
  return stream;
}

}  // namespace seqkern
