// The emulator's own state: blocks, threads and the launch, behind emulator.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "order.h"

namespace seqkern::emulator {

struct AsyncCopy {
  void* shared;
  const void* global;
  int bytes;
  int valid;
  Kind kind;         // of its reads
  const void* code;  // where it began
  int group;
  bool early;  // what it brings was read when it began
  unsigned char read[16];
};

struct Thread {
  Context context;
  Block* block = nullptr;
  uint3 index = {};
  int warp = 0;
  int lane = 0;
  uint32_t warp_epoch = 0;  // grows with each __syncwarp
  uint32_t releases = 0;    // and with each fence and release
  Known known;              // acquired, and not yet handed on to the block by a barrier
  Known heard;              // what came with atomics; known after a fence
  Known fenced;             // known at the last fence; goes with the atomics after it
  void* stack = nullptr;
  bool done = false;
  const char* waits_in = nullptr;  // null while it can run
  Location waits_at;
  const Collective* waits_for = nullptr;
  std::vector<AsyncCopy> copies;
  int copy_group = 0;
};

struct SharedObject {
  const void* key;
  size_t offset;
  size_t bytes;
};

struct GiveBack {
  void operator()(Collective* collective) const;
};
using OwnedCollective = std::unique_ptr<Collective, GiveBack>;

struct Block {
  uint3 index = {};
  uint32_t number = 0;         // in the grid
  size_t slot = 0;             // of shared memory
  uint64_t run = 0;            // names this block's life in the shadow
  uint64_t epoch = 0;          // and the interval between two barriers; both never repeat
  Known known, heard, fenced;  // of all its threads, at the last barrier
  std::vector<Thread*> threads;
  std::vector<std::vector<OwnedCollective>> warps;  // operations under way, per warp
  std::vector<SharedObject> objects;
  size_t shared_bytes = 0;
  size_t static_bytes = 0;
  size_t arrived = 0;
  const char* barrier = nullptr;
  Location barrier_at;
  int yes = 0;     // predicates counted by the barrier under way
  int result = 0;  // of the last one
};

struct Fault {
  std::string message;
  const void* code = nullptr;  // where in the program, if the message does not say
};

struct Launch {
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;  // alive
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  const Block* slow = nullptr;  // a block whose threads seldom run while others can
  std::unique_ptr<Fault> fault;
  bool cooperative = false;
  uint64_t all_known_before = 0;  // what was done in epochs before this comes before everything now
  size_t done = 0;
  size_t at_grid_barrier = 0;
  Location grid_barrier_at;
  uint64_t yields = 0;
};

extern Launch launch;
extern Thread* running;

[[noreturn]] void fail_at(const std::string& message, const void* code);
std::string describe(const Location& where);
uint64_t next_epoch();
uint64_t random_bits();

// ---------------------------------------------------------------- memory (shadow.cpp, global.cpp)

inline constexpr size_t kSharedLimit = 227 * 1024;
inline constexpr size_t kStaticLimit = 48 * 1024;
inline constexpr size_t kSlotSpan = 256 * 1024;
inline constexpr size_t kSlots = 1024;

unsigned char* slot_memory(size_t slot);
void forget(void* p, size_t bytes);  // back to the state never written

bool is_strong(Kind kind);
bool is_write(Kind kind);
const char* name(Kind kind);
std::string not_aligned(Kind kind, size_t bytes, const char* memory);
// A thread behind the access, of the same block, other than `self`.
std::string who_in_block(const Access& access, const Thread& self);

// After a look that found a fault and does not return.
void end_look();
void look_at_global(const void* p, size_t bytes, Kind kind, size_t align, const void* code);
void forget_old_pages();
bool is_parameter(uintptr_t at);
bool is_collective(uintptr_t at);

}  // namespace seqkern::emulator
