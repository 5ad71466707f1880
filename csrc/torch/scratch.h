// Memory that an op has for itself: for the time of a call, or until backward has read it.
#pragma once

#include <memory>

#include "torch/backend.h"

#if defined(SEQKERN_BACKEND_CPU)

#include "torch/kept_memory.h"

// Of torch's C shim from 2.11 on; null with an older torch.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace seqkern {

class Scratch {
 public:
  Scratch(const Tensor&, int64_t bytes) : memory_(bytes) {}
  void* data() const { return memory_.data(); }  // null for no bytes

 private:
  KeptMemory<KeptScratch> memory_;
};

// A tensor [d0, d1, d2], `row` elements from a row of d2 to the next.
class ScratchTensor {
 public:
  ScratchTensor(const Tensor& like, int64_t d0, int64_t d1, int64_t d2, int64_t row)
      : memory_(d0 * d1 * row * like.element_size()) {
    const int64_t sizes[] = {d0, d1, d2}, strides[] = {d1 * row, row, 1};
    tensor_ = torch::stable::from_blob(memory_.data(), Sizes(sizes, 3), Sizes(strides, 3),
                                       like.device(), like.scalar_type());
  }
  const Tensor& tensor() const { return tensor_; }  // not to outlive this

 private:
  KeptMemory<KeptScratch> memory_;
  Tensor tensor_;
};

// A fresh contiguous tensor [d0, d1, d2] that backward will read.
inline Tensor empty_activations(const Tensor& like, int64_t d0, int64_t d1, int64_t d2) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  constexpr int64_t kNeverKept = int64_t{32} << 20;  // by malloc, however often it is asked
  const int64_t sizes[] = {d0, d1, d2}, strides[] = {d1 * d2, d2, 1};
  const int64_t bytes = d0 * d1 * d2 * like.element_size();
  if (!torch_from_blob || bytes < kNeverKept ||
      bytes > static_cast<int64_t>(KeptActivations::kMost)) {
    const Tensor t = empty_on(like, Sizes(sizes, 3), like.scalar_type());
    Backend::before_first_write(t);
    return t;
  }
  using Memory = KeptMemory<KeptActivations>;
  auto memory = std::make_unique<Memory>(bytes);
  const auto device = like.device();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory->data(), 3, sizes, strides, 0, to<int32_t>(from(like.scalar_type())),
      to<int32_t>(from(device.type())), device.index(), &handle,
      to<int32_t>(from(torch::headeronly::Layout::Strided)), nullptr, 0,
      [](void*, void* context) { delete static_cast<Memory*>(context); }, memory.get()));
  memory.release();  // the tensor's from here on
  return Tensor(handle);
}

}  // namespace seqkern

#else

namespace seqkern {

// torch's allocator keeps what it is given back, stream by stream.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = empty_on(like, Sizes({bytes}), ScalarType::Byte);
  }
  void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

class ScratchTensor {
 public:
  ScratchTensor(const Tensor& like, int64_t d0, int64_t d1, int64_t d2, int64_t row) {
    const int64_t sizes[] = {d0, d1, d2}, strides[] = {d1 * row, row, 1};
    tensor_ = empty_strided_on(like, Sizes(sizes, 3), strides, like.scalar_type());
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
};

inline Tensor empty_activations(const Tensor& like, int64_t d0, int64_t d1, int64_t d2) {
  const int64_t sizes[] = {d0, d1, d2};
  return empty_on(like, Sizes(sizes, 3), like.scalar_type());
}

}  // namespace seqkern

#endif
