// Causal attention on CUDA: which kernel takes a call.
#include "cuda/attention.cuh"

namespace seqkern::cuda {
namespace {

enum class Family { kSimt, kMma };

// The one place that chooses. A kernel for newer GPUs (TMA, wgmma) is a further family: its own
// file, its launchers in attention.cuh, a line here and in the switches below.
Family family_of(const AttentionInputs& in) {
  const bool half = in.dtype == DType::kFloat16 || in.dtype == DType::kBFloat16;
  return half && current_device().major >= 8 ? Family::kMma : Family::kSimt;
}

}  // namespace

// ---------------------------------------------------------------- launchers

int64_t attention_forward_workspace(const AttentionForwardArgs&) { return 0; }

int64_t attention_backward_workspace(const AttentionBackwardArgs& a) {
  const int64_t bytes =
      a.in.dtype == DType::kFloat64 ? sizeof(RowStats<double>) : sizeof(RowStats<float>);
  return a.in.B * a.in.NH * a.in.Tq * bytes;
}

void attention_forward(const AttentionForwardArgs& a, Stream stream) {
  switch (family_of(a.in)) {
    case Family::kMma:
      return attention_forward_mma(a, stream);
    case Family::kSimt:
      return attention_forward_simt(a, stream);
  }
}

void attention_backward(const AttentionBackwardArgs& a, Stream stream) {
  switch (family_of(a.in)) {
    case Family::kMma:
      return attention_backward_mma(a, stream);
    case Family::kSimt:
      return attention_backward_simt(a, stream);
  }
}

}  // namespace seqkern::cuda
