// The ops as library.cpp registers them; each is defined in the file of its stem.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

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

Tensor softmax(const Tensor& x, bool log);
Tensor softmax_backward(const Tensor& dy, const Tensor& y, bool log);

Tensor attention_step(const Tensor& q, const Tensor& k_new, const Tensor& v_new,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                      bool interleaved, double scale, int64_t window, double softcap,
                      const std::optional<Tensor>& counters);

Tensor linear_step(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   int64_t norm, const std::optional<Tensor>& norm_weight,
                   const std::optional<Tensor>& norm_bias, double eps, int64_t activation,
                   bool gated, const std::optional<Tensor>& residual);

Tensor decoder_step(const Tensor& x, const std::vector<Tensor>& parameters, const Tensor& cache,
                    const Tensor& lengths, const std::optional<Tensor>& counters, double eps,
                    int64_t activation);

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
// Returns loss, lse, logprobs, saved, and the gradients of hidden, weight and bias for a loss
// gradient of 1; what was not asked for, or cannot be known yet, is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& class_weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss, double softcap,
    bool return_lse, bool return_logprobs, bool grad_hidden, bool grad_weight, bool grad_bias,
    int64_t chunk_bytes);

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    const std::optional<Tensor>& grad_logprobs, const Tensor& hidden, const Tensor& weight,
    const Tensor& target, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& class_weight, const Tensor& saved, int64_t ignore_index,
    int64_t reduction, double label_smoothing, double z_loss, double softcap, int64_t first_class,
    int64_t num_classes, bool grad_hidden, bool grad_weight, bool grad_bias, int64_t chunk_bytes);

Tensor linear_cross_entropy_state(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                  const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                  double label_smoothing, double softcap, int64_t first_class,
                                  int64_t num_classes, int64_t chunk_bytes);
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
