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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      size.size(), size.data(), stride,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
      device.index(), &handle));
  return Tensor(handle);
}

// Contiguous.
inline Tensor empty_on(const Tensor& like, Sizes size, ScalarType dtype) {
  constexpr int64_t kMaxDims = 64;  // torch's own limit
  int64_t stride[kMaxDims];
  int64_t step = 1;
  for (int64_t d = static_cast<int64_t>(size.size()) - 1; d >= 0; --d) {
    stride[d] = step;
    step *= std::max<int64_t>(1, size[d]);
  }
  return empty_strided_on(like, size, stride, dtype);
}

// Memory for the time of a call, on the device of `like`.
class Scratch {
 public:
#if defined(SEQKERN_BACKEND_CPU)
  Scratch(const Tensor&, int64_t bytes) : memory_(bytes) {}
  void* data() const { return memory_.data(); }

 private:
  CpuScratch memory_;
#else
  Scratch(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty_on(like, Sizes({bytes}), ScalarType::Byte);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
#endif
};

// A tensor [d0, d1, d2] in scratch, `row` elements from a row of d2 to the next.
class ScratchTensor {
 public:
  ScratchTensor(const Tensor& like, int64_t d0, int64_t d1, int64_t d2, int64_t row)
      : memory_(like, d0 * d1 * row * like.element_size()) {
    const int64_t sizes[] = {d0, d1, d2}, strides[] = {d1 * row, row, 1};
    tensor = torch::stable::from_blob(memory_.data(), Sizes(sizes, 3), Sizes(strides, 3),
                                      like.device(), like.scalar_type());
  }

 private:
  Scratch memory_;

 public:
  Tensor tensor;  // not to outlive this
};

// A tensor as kernels read its rows: where it is if its last dimension allows.
inline Tensor with_unit_last_stride(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

inline const void* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

}  // namespace seqkern
