// What differs between the devices: how a kernel is run and how memory is obtained.
//
// Each library is compiled with SEQKERN_BACKEND naming one of the classes below; the files of the
// ops are the same in all three, so an argument is checked by the same line whatever the device.
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

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A fresh tensor on the device of `like`. Straight through the C shim: the boxed dispatcher call
// behind torch::stable::empty costs a microsecond more, several times per op.
inline Tensor empty_strided_on(const Tensor& like, Sizes size, const int64_t* stride,
                               ScalarType dtype) {
  const auto device = like.device();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      size.size(), size.data(), stride,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
      device.index(), &handle));
  return Tensor(handle);
}

// The strides of a contiguous tensor.
struct ContiguousStrides {
  static constexpr int64_t kMaxDims = 64;  // torch's own limit
  int64_t of[kMaxDims];

  explicit ContiguousStrides(Sizes size) {
    int64_t step = 1;
    for (int64_t d = static_cast<int64_t>(size.size()) - 1; d >= 0; --d) {
      of[d] = step;
      step *= std::max<int64_t>(1, size[d]);
    }
  }
};

inline Tensor empty_on(const Tensor& like, Sizes size, ScalarType dtype) {
  return empty_strided_on(like, size, ContiguousStrides(size).of, dtype);
}

// A tensor as kernels read its rows: where it is if its last dimension allows.
inline Tensor with_unit_last_stride(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

inline const void* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

}  // namespace seqkern
