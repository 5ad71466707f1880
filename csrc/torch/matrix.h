// Matrices as views of tensors, for GEMMs.
#pragma once

#include "torch/backend.h"

namespace seqkern {

// aoti_torch__reinterpret_tensor counts its offset from the tensor's own.

// Rows [row, row + rows) of a 2-dimensional tensor.
inline Tensor rows_view(const Tensor& t, int64_t row, int64_t rows) {
  const int64_t sizes[] = {rows, t.size(1)};
  const int64_t strides[] = {t.stride(0), t.stride(1)};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, row * t.stride(0), &handle));
  return Tensor(handle);
}

// `rows` x `columns` elements from `offset` on, row after row.
inline Tensor matrix_view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

// Elements [offset, offset + count) of a contiguous tensor.
inline Tensor narrowed(const Tensor& t, int64_t offset, int64_t count) {
  const int64_t sizes[] = {count};
  const int64_t strides[] = {1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 1, sizes, strides, offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& t) {
  const int64_t sizes[] = {t.size(1), t.size(0)};
  const int64_t strides[] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

}  // namespace seqkern
