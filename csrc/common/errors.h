// Errors of the user's, for host code.
//
// Which C++ exception becomes which Python one at torch's boundary differs between torch versions
// (up to 2.13 std::invalid_argument is a ValueError, in 2.15 all are RuntimeErrors). So the kind
// travels in the text, and seqkern/ops/_registry.py raises it.
#pragma once

#include <stdexcept>
#include <string>

namespace seqkern {

[[noreturn]] inline void throw_value_error(const std::string& message) {
  throw std::runtime_error("ValueError: " + message);
}

[[noreturn]] inline void throw_index_error(const std::string& message) {
  throw std::runtime_error("IndexError: " + message);
}

}  // namespace seqkern
