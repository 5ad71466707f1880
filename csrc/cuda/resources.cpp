// What each kernel takes of a multiprocessor on the current device, for `seqkern doctor`.
#include <cuda_runtime.h>

#include <sstream>
#include <string>

#include "cuda/kernels.h"

namespace seqkern::cuda {
namespace {

void append(void* context, const char* name, const void* kernel) {
  auto& out = *static_cast<std::ostringstream*>(context);
  cudaFuncAttributes a = {};
  const cudaError_t status = cudaFuncGetAttributes(&a, kernel);
  out << (out.tellp() > 1 ? ", " : "") << "{\"name\": \"" << name << "\"";
  if (status == cudaSuccess) {
    out << ", \"registers\": " << a.numRegs << ", \"shared_bytes\": " << a.sharedSizeBytes
        << ", \"local_bytes\": " << a.localSizeBytes
        << ", \"max_threads\": " << a.maxThreadsPerBlock
        << ", \"architecture\": " << a.binaryVersion;
  } else {
    static_cast<void>(cudaGetLastError());
    out << ", \"error\": \"" << cudaGetErrorString(status) << "\"";
  }
  out << "}";
}

}  // namespace
}  // namespace seqkern::cuda

// A JSON list of objects: name, and registers, shared_bytes, local_bytes, max_threads, architecture
// or, where there is no usable device, error. The string lives until the thread calls again.
extern "C" __attribute__((visibility("default"))) const char* seqkern_cuda_kernel_resources() {
  static thread_local std::string table;
  std::ostringstream out;
  out << "[";
  seqkern::cuda::visit_cross_entropy_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_cross_entropy_backward_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_cross_entropy_columns_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_lstm_cell_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_lstm_steps_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_lstm_steps_backward_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_lstm_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_lstm_backward_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_gru_rnn_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_gru_rnn_backward_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_gru_rnn_cell_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_gru_rnn_steps_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_sample_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_sample_passes_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_softmax_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_linear_cross_entropy_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_linear_cross_entropy_sums_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_attention_simt_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_attention_forward_mma_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_attention_backward_mma_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_attention_step_kernels(seqkern::cuda::append, &out);
  seqkern::cuda::visit_linear_step_kernels(seqkern::cuda::append, &out);
  out << "]";
  table = out.str();
  return table.c_str();
}
