// A second stack to run a function on, and the switch between stacks.
#pragma once

#include <cstddef>

namespace seqkern::emulator {

// Where a stack stopped.
struct Context {
  void* sp = nullptr;
};

inline constexpr size_t kStackBytes = 128 * 1024;

// The i-th stack, made when first asked for and kept; below it lies a page that faults.
void* stack(size_t i);

// Makes `context` start entry() on the stack when switched to; entry must never return.
void prepare(Context& context, void* stack, void (*entry)());

// Saves the running stack in `from` and continues `to`.
void switch_context(Context& from, Context& to);

}  // namespace seqkern::emulator
