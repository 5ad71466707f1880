// What differs between the devices: how a kernel is run and how memory is obtained.
//
// Each library is compiled with SEQKERN_BACKEND naming one of the classes below; the files of the
// ops are the same in all three, so an argument is checked by the same line whatever the device.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>

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

#if defined(SEQKERN_BACKEND_CPU)
// Of torch's C shim from 2.11 on; null with an older torch.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);
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

// A fresh contiguous tensor [d0, d1, d2] that backward will read.
inline Tensor empty_activations(const Tensor& like, int64_t d0, int64_t d1, int64_t d2) {
  const int64_t sizes[] = {d0, d1, d2};
  const ScalarType type = like.scalar_type();
#if defined(SEQKERN_BACKEND_CPU)
  // What malloc never keeps, however often it is asked.
  constexpr int64_t kNeverKept = int64_t{32} << 20;
  const int64_t bytes = d0 * d1 * d2 * like.element_size();
  const bool keeps = bytes >= kNeverKept && bytes <= static_cast<int64_t>(KeptActivations::kMost);
  if (keeps && torch_from_blob) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    auto memory = std::make_unique<KeptMemory<KeptActivations>>(bytes);
    const int64_t strides[] = {d1 * d2, d2, 1};
    const auto device = like.device();
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
        memory->data(), 3, sizes, strides, 0, to<int32_t>(from(type)),
        to<int32_t>(from(device.type())), device.index(), &handle,
        to<int32_t>(from(torch::headeronly::Layout::Strided)), nullptr, 0,
        [](void*, void* context) { delete static_cast<KeptMemory<KeptActivations>*>(context); },
        memory.get()));
    memory.release();
    return Tensor(handle);
  }
#endif
  const Tensor t = empty_on(like, Sizes(sizes, 3), type);
  Backend::before_first_write(t);
  return t;
}

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
