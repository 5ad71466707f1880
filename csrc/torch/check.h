// Argument checks of the torch layer. A failed check names the op, the argument, what was expected
// and what came: "cross_entropy: target must be int64 [2048], got float32 [2047]".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>

#include "common/dtype.h"
#include "common/errors.h"
#include "common/rows.h"

namespace seqkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string_view dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// What messages say of tensors. As text only when a check has failed: a stream takes longer than
// all checks of a call.
struct SizesInWords {
  const int64_t* sizes;
  int64_t dims;
};
inline std::ostream& operator<<(std::ostream& out, const SizesInWords& words) {
  out << '[';
  for (int64_t d = 0; d < words.dims; ++d) out << (d ? ", " : "") << words.sizes[d];
  return out << ']';
}
inline SizesInWords shape_name(const Tensor& t) { return {t.sizes().data(), t.dim()}; }
// Not to outlive the expression that it is part of.
inline SizesInWords shape_name(std::initializer_list<int64_t> sizes) {
  return {sizes.begin(), static_cast<int64_t>(sizes.size())};
}

// "float32 [2047]"
struct TensorInWords {
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& out, const TensorInWords& words) {
  return out << dtype_name(words.t.scalar_type()) << ' ' << shape_name(words.t);
}
inline TensorInWords describe(const Tensor& t) { return {t}; }

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// ValueError in Python. No part is text that every call would make.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  static_assert(!(std::is_same_v<Parts, std::string> || ...), "for each call: see SizesInWords");
  if (!ok) [[unlikely]] {
    throw_value_error(message(parts...));
  }
}

inline DType float_dtype(const Tensor& t, std::string_view op, std::string_view name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      throw_value_error(message(
          op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", describe(t)));
  }
}

inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct PlaceInWords {
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& out, const PlaceInWords& words) {
  return words.t.is_cpu() ? out << "cpu" : out << "cuda:" << words.t.get_device_index();
}

inline void check_same_device(const Tensor& a, const Tensor& b, std::string_view op,
                              std::string_view a_name, std::string_view b_name) {
  check(a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index(), op, ": ", b_name,
        " must be on the device of ", a_name, ", ", PlaceInWords{a}, ", got ", PlaceInWords{b});
}

// The leading dimensions of `t` as Rows, neighbours merged where they are evenly spaced.
// The last dimension must have stride 1 (or size 1).
inline Rows rows_of(const Tensor& t, std::string_view op, std::string_view name) {
  Rows rows;
  int dims = 0;
  int64_t size[kMaxRowDims], stride[kMaxRowDims];
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    if (sizes[d] == 1) continue;
    if (dims > 0 && stride[dims - 1] == sizes[d] * strides[d]) {
      size[dims - 1] *= sizes[d];
      stride[dims - 1] = strides[d];
      continue;
    }
    check(dims < kMaxRowDims, op, ": ", name, " must have at most ", kMaxRowDims,
          " irregularly strided dimensions, got ", shape_name(t));
    size[dims] = sizes[d];
    stride[dims++] = strides[d];
  }
  if (dims == 0) return rows;
  rows.dims = dims;
  for (int d = 0; d < dims; ++d) {
    rows.size[d] = size[d];
    rows.stride[d] = stride[d];
  }
  return rows;
}

// Of softcap tanh(x / softcap); 0 for none. (An infinite one is none in the limit, and NaN in
// numbers.)
inline void check_softcap(std::string_view op, double softcap) {
  check(softcap >= 0 && std::isfinite(softcap), op, ": softcap must be at least 0 and finite, got ",
        softcap);
}

}  // namespace seqkern
