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

}  // namespace seqkern
