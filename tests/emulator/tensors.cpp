// Between the torch layer and torch, when a kernel's arguments are made: where an op's tensors lie
// goes to global.cpp, and fresh memory is NaN in every type.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>

#include "emulator.h"

extern "C" {

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError __real_aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes,
                                               const int64_t* strides, int32_t dtype,
                                               int32_t device_type, int32_t device_index,
                                               AtenTensorHandle* result);
}

namespace {

// From the first element's to the last one's end.
size_t bytes_of(AtenTensorHandle tensor) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  if (aoti_torch_get_dim(tensor, &dim) || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_dtype(tensor, &dtype)) {
    return 0;
  }
  int64_t last = 0;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return static_cast<size_t>(last + 1) * aoti_torch_dtype_element_size(dtype);
}

}  // namespace

extern "C" {

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (!error) seqkern::emulator::allow(*data, bytes_of(tensor), false);
  return error;
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (!error) seqkern::emulator::allow(*data, bytes_of(tensor), true);
  return error;
}

AOTITorchError __wrap_aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes,
                                               const int64_t* strides, int32_t dtype,
                                               int32_t device_type, int32_t device_index,
                                               AtenTensorHandle* result) {
  const AOTITorchError error = __real_aoti_torch_empty_strided(ndim, sizes, strides, dtype,
                                                               device_type, device_index, result);
  void* data = nullptr;
  if (!error && !__real_torch_get_mutable_data_ptr(*result, &data) && data) {
    std::memset(data, 0xff, bytes_of(*result));
  }
  return error;
}
}
