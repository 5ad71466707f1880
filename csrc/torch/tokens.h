// Sequences of different lengths without their padding: what is moved so that the products around a
// recurrent kernel cost what the real tokens cost, and never meet what stands in the padding.
//
// Where the host can read lengths (CPU), the tokens of row b stand at first[b] .. first[b] + L_b
// - 1.
#pragma once

#include <cstring>
#include <vector>

#include "torch/backend.h"

namespace seqkern {

struct Tokens {
  std::vector<int64_t> first;  // [B]
  int64_t count = 0;
  const int64_t* lengths = nullptr;  // [B]
  int64_t T = 0, B = 0;

  Tokens() = default;
  Tokens(const int64_t* lengths, int64_t T, int64_t B)
      : first(static_cast<size_t>(B)), lengths(lengths), T(T), B(B) {
    for (int64_t b = 0; b < B; ++b) {
      first[static_cast<size_t>(b)] = count;
      count += lengths[b];
    }
  }

  // f(token, t, b) for all real tokens, rows in parallel.
  template <class F>
  void each(F f) const {
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t t = 0; t < lengths[b]; ++t) f(first[static_cast<size_t>(b)] + t, t, b);
      }
    });
  }

  // Rows of [T, B, W] as [tokens, W].
  Tensor gather(const Tensor& padded) const {
    const int64_t size[] = {count, padded.size(2)};
    const Tensor tokens = empty_on(padded, Sizes(size, 2), padded.scalar_type());
    Backend::before_first_write(tokens);
    const int64_t bytes = padded.size(2) * padded.element_size();
    const char* from = static_cast<const char*>(padded.const_data_ptr());
    char* to = static_cast<char*>(tokens.mutable_data_ptr());
    each([&](int64_t token, int64_t t, int64_t b) {
      std::memcpy(to + token * bytes, from + (t * B + b) * bytes, static_cast<size_t>(bytes));
    });
    return tokens;
  }

  // Values [T, B] as [tokens].
  std::vector<int64_t> gather(const int64_t* values) const {
    std::vector<int64_t> tokens(static_cast<size_t>(count));
    each([&](int64_t token, int64_t t, int64_t b) {
      tokens[static_cast<size_t>(token)] = values[t * B + b];
    });
    return tokens;
  }

  // [tokens, W] as [T, B, W] with zeros for padding.
  Tensor scatter(const Tensor& tokens) const {
    const int64_t size[] = {T, B, tokens.size(1)};
    const Tensor padded = empty_on(tokens, Sizes(size, 3), tokens.scalar_type());
    Backend::before_first_write(padded);
    const int64_t bytes = tokens.size(1) * tokens.element_size();
    const char* from = static_cast<const char*>(tokens.const_data_ptr());
    char* to = static_cast<char*>(padded.mutable_data_ptr());
    each([&](int64_t token, int64_t t, int64_t b) {
      std::memcpy(to + (t * B + b) * bytes, from + token * bytes, static_cast<size_t>(bytes));
    });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = lengths[b]; t < T; ++t) {
        std::memset(to + (t * B + b) * bytes, 0, static_cast<size_t>(bytes));
      }
    }
    return padded;
  }

  // h before each token as [tokens, P], from the output [T, B, P] and h0 [B, P] (none: zeros).
  Tensor states_before(const Tensor& output, const std::optional<Tensor>& h0, bool reverse) const {
    const int64_t size[] = {count, output.size(2)};
    const Tensor tokens = empty_on(output, Sizes(size, 2), output.scalar_type());
    Backend::before_first_write(tokens);
    const int64_t bytes = output.size(2) * output.element_size();
    const char* from = static_cast<const char*>(output.const_data_ptr());
    const char* initial = static_cast<const char*>(data(h0));
    char* to = static_cast<char*>(tokens.mutable_data_ptr());
    each([&](int64_t token, int64_t t, int64_t b) {
      char* row = to + token * bytes;
      if (t != (reverse ? lengths[b] - 1 : 0)) {
        std::memcpy(row, from + ((reverse ? t + 1 : t - 1) * B + b) * bytes,
                    static_cast<size_t>(bytes));
      } else if (initial) {
        std::memcpy(row, initial + b * bytes, static_cast<size_t>(bytes));
      } else {
        std::memset(row, 0, static_cast<size_t>(bytes));
      }
    });
    return tokens;
  }
};

}  // namespace seqkern
