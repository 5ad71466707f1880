// Counts what kernels do, for what a GPU's time goes into: instructions of each class, and of each
// access to memory, how many passes over the banks of shared memory and how many sectors of global
// memory a warp's lanes need together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace seqkern::emulator::ptx {

struct CountedAccess {
  const void* p;
  size_t bytes;
  bool write;
  const void* code;
};
void count_access(const CountedAccess& access);

// How often threads ran each piece of a kernel.
struct Counters {
  uint64_t* first;
  size_t count;
};
// The launch that begins is of this kernel.
void begin_counting(const std::string& kernel, const Counters& counters);

}  // namespace seqkern::emulator::ptx
