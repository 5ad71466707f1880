// Tensors that share another's memory, for GEMMs and kernels.
//
// Through the C shim, as empty_on; and no views to autograd, which an op may not return.
#pragma once

#include "torch/backend.h"

namespace seqkern {

// `offset` is counted from the tensor's own.
inline Tensor reinterpreted(const Tensor& t, Sizes sizes, const int64_t* strides,
                            int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.data(), strides, offset, &handle));
  return Tensor(handle);
}

// A copy where memory does not allow the shape.
inline Tensor reshaped(const Tensor& t, Sizes sizes) {
  if (!t.is_contiguous()) return torch::stable::reshape(t, sizes);
  return reinterpreted(t, sizes, ContiguousStrides(sizes).of);
}

// t[index]
inline Tensor entry_of(const Tensor& t, int64_t index) {
  const Sizes sizes(t.sizes().data() + 1, t.dim() - 1);
  return reinterpreted(t, sizes, t.strides().data() + 1, index * t.stride(0));
}

// Rows [row, row + rows) of a 2-dimensional tensor.
inline Tensor rows_view(const Tensor& t, int64_t row, int64_t rows) {
  return reinterpreted(t, Sizes({rows, t.size(1)}), t.strides().data(), row * t.stride(0));
}

// `rows` x `columns` elements from `offset` on, row after row.
inline Tensor matrix_view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns) {
  const int64_t strides[] = {columns, 1};
  return reinterpreted(t, Sizes({rows, columns}), strides, offset);
}

// Elements [offset, offset + count) of a contiguous tensor.
inline Tensor narrowed(const Tensor& t, int64_t offset, int64_t count) {
  const int64_t strides[] = {1};
  return reinterpreted(t, Sizes({count}), strides, offset);
}

inline Tensor transposed(const Tensor& t) {
  const int64_t strides[] = {t.stride(1), t.stride(0)};
  return reinterpreted(t, Sizes({t.size(1), t.size(0)}), strides);
}

}  // namespace seqkern
