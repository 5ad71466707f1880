// Stands in for CUDA's header in the emulator: the grid and the block as groups.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

struct grid_group {
  void sync(seqkern::emulator::Location where = seqkern::emulator::Location::current()) const {
    seqkern::emulator::grid_barrier(where);
  }
};
inline grid_group this_grid() { return {}; }

struct thread_block {
  void sync(seqkern::emulator::Location where = seqkern::emulator::Location::current()) const {
    seqkern::emulator::block_barrier("thread_block::sync", where);
  }
};
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups
