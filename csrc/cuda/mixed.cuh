// The pairs of element types of a decoding step: what is computed with, and what memory holds much
// of (a cache, a weight), which may be narrower.
#pragma once

#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace seqkern::cuda {

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double>     ? DType::kFloat64
         : std::is_same_v<T, Half>     ? DType::kFloat16
         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                       : DType::kFloat32;
}

// f(TypeTag<T>, TypeTag<C>, "op<T, C>") for each pair.
template <class F>
void for_each_mixed(const char* op, F&& f) {
  const auto call = [&](auto tag, auto stored, const char* types) {
    f(tag, stored, std::string(op) + types);
  };
  call(TypeTag<float>{}, TypeTag<float>{}, "<float32>");
  call(TypeTag<float>{}, TypeTag<BFloat16>{}, "<float32, bfloat16>");
  call(TypeTag<float>{}, TypeTag<Half>{}, "<float32, float16>");
  call(TypeTag<double>{}, TypeTag<double>{}, "<float64>");
  call(TypeTag<Half>{}, TypeTag<Half>{}, "<float16>");
  call(TypeTag<BFloat16>{}, TypeTag<BFloat16>{}, "<bfloat16>");
}

}  // namespace seqkern::cuda
