// Which accesses to memory come before which, as CUDA promises it: barriers of a block and of the
// grid, __syncwarp, fences around atomics, releases and acquires. What else happens to run first
// comes before nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace seqkern::emulator {

struct Block;
struct Thread;

// One warp's accesses within one interval. Lanes are ordered among themselves by __syncwarp, with
// other warps only by a barrier, which begins another epoch.
struct Access {
  uint64_t epoch = 0;  // of the block, never repeated by any
  uint32_t lanes = 0;
  uint32_t warp_epoch = 0;
  uint32_t releases = 0;  // of the last lane, before the access
  uint32_t block = 0;
  int16_t warp = 0;
  bool strong = false;  // may meet other strong ones: atomics, and relaxed loads and stores
};

// Where a thread was when it released, or several of a warp: what comes before that also comes
// before what follows an acquire.
struct Position {
  uint64_t epoch;
  uint32_t lanes;
  uint32_t warp_epoch;
  uint32_t releases;
  uint32_t block;
  int16_t warp;
};
using Known = std::vector<Position>;

void learn(Known& known, const Known& more);

// Whether nothing orders the access before what the thread does now. Of accesses of one block,
// which is enough for its shared memory, or of any of the launch.
bool unordered_in_block(const Access& before, const Thread& now);
bool unordered(const Access& before, const Thread& now);

void record(Access& access, const Thread& thread, bool strong);

// What a barrier of the block does: every thread knows what each of them did. The grid's lets all
// know all.
void meet(Block& block);
void meet_all();
// A lane's part of __syncwarp.
void meet_lanes(Thread& self, uint32_t mask);
void begin_launch();

// __threadfence: with atomics after it and before it, a release and an acquire.
void fence(Thread& self);
void read_modify_write(Thread& self, const void* p);
void store_flag(Thread& self, const void* p);  // a release
void load_flag(Thread& self, const void* p);   // an acquire

}  // namespace seqkern::emulator
