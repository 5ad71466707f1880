// What differs between the devices: how a kernel is run and how memory is obtained.
//
// Each library is compiled with SEQKERN_BACKEND naming one of the classes below; the files of the ops are the
// same in all three, so an argument is checked by the same line whatever the device.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "torch/check.h"

#if defined(SEQKERN_BACKEND_CPU)
#include "torch/backend_cpu.h"
#elif defined(SEQKERN_BACKEND_CUDA)
#include "torch/backend_cuda.h"
#elif defined(SEQKERN_BACKEND_EMULATOR)
#include "torch/backend_emulator.h"
#else
#error "the torch layer is compiled with SEQKERN_BACKEND_{CPU,CUDA,EMULATOR} (CMakeLists.txt)"
#endif

namespace seqkern {

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::empty({size.begin(), size.size()}, dtype, std::nullopt, like.device());
}

inline const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace seqkern
