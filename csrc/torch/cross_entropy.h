// What the checks of cross_entropy and linear_cross_entropy share.
#pragma once

#include "ops/cross_entropy.h"
#include "torch/backend.h"

namespace seqkern {

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool is_class_index(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Byte;
}

inline void check_options(std::string_view op, int64_t reduction, double label_smoothing,
                          double z_loss, double softcap) {
  check(reduction >= 0 && reduction <= 2, op,
        ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  check(label_smoothing >= 0 && label_smoothing <= 1, op,
        ": label_smoothing must be between 0 and 1, got ", label_smoothing);
  check(z_loss >= 0, op, ": z_loss must be at least 0, got ", z_loss);
  check_softcap(op, softcap);
}

// The sizes of `rows` are those of `t` but its last.
inline bool leading_sizes_match(const Tensor& rows, const Tensor& t) {
  if (rows.dim() != t.dim() - 1) return false;
  for (int64_t d = 0; d < rows.dim(); ++d) {
    if (rows.size(d) != t.size(d)) return false;
  }
  return true;
}

inline SizesInWords row_shape(const Tensor& t) { return {t.sizes().data(), t.dim() - 1}; }

// target as contiguous int64.
inline Tensor as_classes(const Tensor& target) {
  const Tensor classes = target.scalar_type() == ScalarType::Long
                             ? target
                             : torch::stable::to(target, ScalarType::Long);
  return classes.is_contiguous() ? classes : torch::stable::contiguous(classes);
}

// Where the host can look: IndexError for a target in neither [0, V) nor ignore_index.
inline void check_classes(std::string_view op, const int64_t* target, int64_t N, int64_t V,
                          int64_t ignore_index) {
  if constexpr (Backend::kHostReadable) {
    // In sign bits, which every processor has vectors for: y or V - 1 - y is negative, and y is not
    // ignore_index.
    const auto sign = [&](int64_t y) {
      const uint64_t u = static_cast<uint64_t>(y), last = static_cast<uint64_t>(V - 1);
      const uint64_t other = u ^ static_cast<uint64_t>(ignore_index);
      return (u | (last - u)) & (other | -other);
    };
    const auto bad = [&](int64_t y) { return static_cast<int64_t>(sign(y)) < 0; };
    uint64_t any = 0;
    for (int64_t n = 0; n < N; ++n) any |= sign(target[n]);
    if (static_cast<int64_t>(any) >= 0) [[likely]]
      return;
    int64_t n = 0;
    while (!bad(target[n])) ++n;
    throw_index_error(message(op, ": target must be in [0, ", V, ") or ignore_index (",
                              ignore_index, "), got ", target[n], " at row ", n));
  }
}

// What backward needs of a row besides the logits (for linear_cross_entropy, the sum itself instead
// of its logarithm), in one tensor Acc [2 N] or, for a reduced loss, [2 N + 2].
template <class P>
struct SavedRows {
  SavedRows(P* base, int64_t N, bool reduced, int64_t item)
      : row_max(base),
        row_log_sum(base + N * item),
        norm(reduced ? base + 2 * N * item : nullptr) {}
  static int64_t size(int64_t N, bool reduced) { return 2 * N + (reduced ? 2 : 0); }
  P* row_max;
  P* row_log_sum;
  P* norm;
};

}  // namespace seqkern
