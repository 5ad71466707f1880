// Element types a contract can name, and the 16-bit floats as storage (host and device).
#pragma once

#include <cstdint>
#include <type_traits>

namespace seqkern {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Storage only: arithmetic happens in float. Loads and stores are in cpu/simd.h and cuda/vec.cuh.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a kernel accumulates in: double for double, float for everything else.
template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f with the TypeTag of a dtype's element type: the one place a run-time dtype becomes a
// compile-time type. Instruction sets that differ from another in what they do for 16-bit types
// alone get no others (csrc/cpu/dispatch.cpp).
template <class F>
decltype(auto) dispatch_dtype([[maybe_unused]] DType dtype, F&& f) {
#if defined(SEQKERN_ONLY_BF16)
  return f(TypeTag<BFloat16>{});
#elif defined(SEQKERN_ONLY_16_BIT)
  if (dtype == DType::kFloat16) return f(TypeTag<Half>{});
  return f(TypeTag<BFloat16>{});
#else
  switch (dtype) {
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kFloat16:
      return f(TypeTag<Half>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    default:
      return f(TypeTag<float>{});
  }
#endif
}

}  // namespace seqkern
