// Every op seqkern registers: schemas once, implementations per backend.
//
// The CPU library defines namespace `seqkern`; the CUDA library adds CUDA kernels to it; the
// test-only emulator defines the same ops as `seqkern_emu`, on CPU tensors.
#include <torch/csrc/stable/library.h>

#include "torch/backend.h"
#include "torch/ops.h"

namespace seqkern {
namespace {

#if !defined(SEQKERN_BACKEND_CUDA)
void define(torch::stable::detail::StableLibrary& m) {
  // `cross_entropy` is differentiable, with autograd registered from Python
  // (seqkern/ops/cross_entropy.py), which costs tens of microseconds a call;
  // `cross_entropy_forward` is the same kernel without it.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, int "
      "reduction, "
      "float label_smoothing, float z_loss, float softcap, bool return_lse) "
      "-> (Tensor loss, Tensor lse, Tensor saved)");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "int reduction, float label_smoothing, float z_loss, float softcap, bool return_lse) "
      "-> (Tensor loss, Tensor lse, Tensor saved)");
  m.def(
      "cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor logits, Tensor target, "
      "Tensor? weight, Tensor saved, int ignore_index, int reduction, "
      "float label_smoothing, float z_loss, float softcap) -> Tensor");
  m.def("softmax(Tensor x, bool log) -> Tensor");
  m.def("softmax_forward(Tensor x, bool log) -> Tensor");
  m.def("softmax_backward(Tensor dy, Tensor y, bool log) -> Tensor");
  // The caches are written in place; counters are scratch that is left as it was.
  m.def(
      "attention_step(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor positions, Tensor? cos, Tensor? sin, bool interleaved, "
      "float scale, int window, float softcap, Tensor(c!)? counters) -> Tensor");
  m.def(
      "linear_step(Tensor x, Tensor weight, Tensor? bias, int norm, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps, int activation, bool gated, Tensor? residual) -> Tensor");
  m.def(
      "decoder_step(Tensor x, Tensor[] parameters, Tensor(a!) cache, Tensor lengths, "
      "Tensor(b!)? counters, float eps, int activation) -> Tensor");
  // Each option as one number, or per row.
  m.def(
      "sample(Tensor logits, Tensor? token_counts, float temperature, int top_k, float top_p, "
      "float min_p, float repetition_penalty, float presence_penalty, float frequency_penalty, "
      "int seed, int step, Tensor? temperature_rows, Tensor? top_k_rows, Tensor? top_p_rows, "
      "Tensor? min_p_rows, Tensor? repetition_penalty_rows, Tensor? presence_penalty_rows, "
      "Tensor? frequency_penalty_rows, Tensor? seed_rows, Tensor? step_rows, bool model_logprob) "
      "-> (Tensor tokens, Tensor logprobs)");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, int ignore_index, int reduction, float label_smoothing, "
      "float z_loss, float softcap, bool return_lse, bool return_logprobs, bool grad_hidden, "
      "bool grad_weight, bool grad_bias, int chunk_bytes) -> (Tensor loss, Tensor lse, "
      "Tensor logprobs, Tensor saved, Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, int ignore_index, int reduction, float label_smoothing, "
      "float z_loss, float softcap, bool return_lse, bool return_logprobs, bool grad_hidden, "
      "bool grad_weight, bool grad_bias, int chunk_bytes) -> (Tensor loss, Tensor lse, "
      "Tensor logprobs, Tensor saved, Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_logprobs, "
      "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
      "Tensor saved, int ignore_index, int reduction, float label_smoothing, float z_loss, "
      "float softcap, int first_class, int num_classes, bool grad_hidden, bool grad_weight, "
      "bool grad_bias, int chunk_bytes) -> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_cross_entropy_state(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, int ignore_index, float label_smoothing, float softcap, "
      "int first_class, int num_classes, int chunk_bytes) -> Tensor");

  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? cu_seqlens, "
      "Tensor? alibi_slopes, Tensor? seed, float scale, int window, float softcap, "
      "float dropout_p) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? cu_seqlens, "
      "Tensor? alibi_slopes, Tensor? seed, float scale, int window, float softcap, "
      "float dropout_p) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? lengths, Tensor? cu_seqlens, Tensor? alibi_slopes, Tensor? seed, "
      "float scale, int window, float softcap, float dropout_p) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}
#endif

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("linear_step", TORCH_BOX(&linear_step));
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_forward", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
  m.impl("linear_cross_entropy_state", TORCH_BOX(&linear_cross_entropy_state));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_forward", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_step", TORCH_BOX(&attention_step));
}

}  // namespace
}  // namespace seqkern

#if defined(SEQKERN_BACKEND_CPU)
STABLE_TORCH_LIBRARY(seqkern, m) { seqkern::define(m); }
STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) { seqkern::implement(m); }
#elif defined(SEQKERN_BACKEND_EMULATOR)
STABLE_TORCH_LIBRARY(seqkern_emu, m) { seqkern::define(m); }
STABLE_TORCH_LIBRARY_IMPL(seqkern_emu, CPU, m) { seqkern::implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(seqkern, CUDA, m) { seqkern::implement(m); }
#endif
