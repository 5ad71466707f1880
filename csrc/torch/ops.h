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

Tensor attention_step(const Tensor& q, const Tensor& k_new, const Tensor& v_new,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                      bool interleaved, double scale, int64_t window, double softcap,
                      const std::optional<Tensor>& counters);

std::tuple<Tensor, Tensor> sample(
    const Tensor& logits, const std::optional<Tensor>& token_counts, double temperature,
    int64_t top_k, double top_p, double min_p, double repetition_penalty, double presence_penalty,
    double frequency_penalty, int64_t seed, int64_t step,
    const std::optional<Tensor>& temperature_rows, const std::optional<Tensor>& top_k_rows,
    const std::optional<Tensor>& top_p_rows, const std::optional<Tensor>& min_p_rows,
    const std::optional<Tensor>& repetition_penalty_rows,
    const std::optional<Tensor>& presence_penalty_rows,
    const std::optional<Tensor>& frequency_penalty_rows, const std::optional<Tensor>& seed_rows,
    const std::optional<Tensor>& step_rows, bool model_logprob);

}  // namespace seqkern
