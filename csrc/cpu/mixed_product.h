// Matrix products of bf16 numbers with float results, on processors that multiply such numbers
// (matrix_tiles.h). A team kernel as those of kernels.h, but of those instruction sets alone:
// elsewhere 16-bit operands are better multiplied as floats.
#pragma once

#include <cstdint>

namespace seqkern::cpu {

// Element (i, k) of a matrix is data[i * stride + k * k_stride]; products sum over k.
struct MixedOperand {
  const void* data;  // bf16 [size, K], any strides
  int64_t size;
  int64_t stride, k_stride;
};

// out = a b^T (+ out).
struct MixedProductArgs {
  int64_t K;
  MixedOperand a;  // [N, K]
  MixedOperand b;  // [M, K]
  float* out;      // [N, M], rows out_stride apart; overlaps neither a nor b
  int64_t out_stride;
  bool accumulate;
  void* workspace;  // bytes of mixed_product_workspace, 64-byte aligned
};

bool has_mixed_product();  // whether the functions below may be called

#define SEQKERN_DECLARE_MIXED_PRODUCT                                             \
  int64_t mixed_product_workspace(const MixedProductArgs& args, int64_t members); \
  void mixed_product_prepare(const MixedProductArgs& args, int64_t members);      \
  void mixed_product(const MixedProductArgs& args, int64_t members, int64_t member);

SEQKERN_DECLARE_MIXED_PRODUCT
namespace avx512_bf16 {
SEQKERN_DECLARE_MIXED_PRODUCT
}  // namespace avx512_bf16
namespace amx {
SEQKERN_DECLARE_MIXED_PRODUCT
}  // namespace amx
#if defined(SEQKERN_TILES_IN_SOFTWARE)  // tests/cpu
namespace SEQKERN_ISA {
SEQKERN_DECLARE_MIXED_PRODUCT
}  // namespace SEQKERN_ISA
#endif

}  // namespace seqkern::cpu
