// The ops as library.cpp registers them; each is defined in the file of its stem.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace seqkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 int64_t ignore_index, int64_t reduction,
                                                 double label_smoothing, double z_loss,
                                                 double softcap, bool return_lse);

Tensor cross_entropy_backward(const std::optional<Tensor>& grad_loss,
                              const std::optional<Tensor>& grad_lse, const Tensor& logits,
                              const Tensor& target, const std::optional<Tensor>& weight,
                              const Tensor& saved, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, double z_loss, double softcap);

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& lengths,
                                     const std::optional<Tensor>& cu_seqlens,
                                     const std::optional<Tensor>& alibi_slopes,
                                     const std::optional<Tensor>& seed, double scale,
                                     int64_t window, double softcap, double dropout_p);

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const std::optional<Tensor>& dout, const std::optional<Tensor>& dlse, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, double scale,
    int64_t window, double softcap, double dropout_p);

}  // namespace seqkern
