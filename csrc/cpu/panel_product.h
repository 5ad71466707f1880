// Matrix products whose operands are both turned into panels first: of bf16 numbers with float
// results, on processors that multiply such numbers (matrix_tiles.h), and of floats.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cpu {

// Element (i, k) of a matrix is data[i * stride + k * k_stride]; products sum over k.
struct PanelOperand {
  const void* data;  // T [size, K], any strides
  int64_t size;
  int64_t stride, k_stride;
};

// out = a b^T (+ out).
struct PanelProductArgs {
  DType dtype;  // kFloat32 or kBFloat16
  int64_t K;
  PanelOperand a;  // [N, K]
  PanelOperand b;  // [M, K]
  float* out;      // [N, M], rows out_stride apart; overlaps neither a nor b
  int64_t out_stride;
  bool accumulate;
  void* workspace;  // bytes of panel_product_workspace, 64-byte aligned
};

// Whether bf16 numbers are multiplied as such: elsewhere they are better turned into floats.
bool multiplies_bf16();
// Whether large products of floats take less time here than in torch's BLAS: MKL on AMD's
// processors.
bool multiplies_floats();

}  // namespace seqkern::cpu
