// Shared memory and its shadow: who wrote and read each pair of bytes since when. Finds reads of
// memory never written, accesses outside the block's objects, and two threads meeting at an
// address, one of them writing, with no barrier between.
//
// Calls come from the code GCC generates under -fsanitize=thread.
#include <sys/mman.h>

#include <new>
#include <string>

#include "runtime.h"

namespace seqkern::emulator {
namespace {

// One warp's accesses within one interval. Lanes are ordered among themselves by __syncwarp, with
// other warps only by a barrier, which begins another epoch.
struct Access {
  uint64_t epoch = 0;
  uint32_t lanes = 0;
  uint32_t warp_epoch = 0;
  int32_t warp = 0;
  bool atomic = false;
};

// Of two bytes: enough for the 16-bit types; races of single bytes are not looked for.
struct Cell {
  uint64_t run = 0;  // the block in which it was written
  Access write;
  Access read;        // the last reading warp
  Access other_read;  // and another one
};
constexpr size_t kGrain = 2;

bool checks = true;

template <class X>
X* reserve(size_t count) {
  // Touched page by page as it is used.
  void* p = ::mmap(nullptr, count * sizeof(X), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<X*>(p);
}

unsigned char* const memory = reserve<unsigned char>(kSlots * kSlotSpan);
Cell* const cells = reserve<Cell>(kSlots * kSlotSpan / kGrain);

bool unordered(const Access& before, const Thread& now) {
  if (before.epoch != now.block->epoch) return false;
  if (before.warp != now.warp) return true;
  return before.warp_epoch >= now.warp_epoch && (before.lanes & ~(1u << now.lane)) != 0;
}

void record(Access& access, const Thread& thread, bool atomic) {
  const bool same = access.epoch == thread.block->epoch && access.warp == thread.warp &&
                    access.warp_epoch == thread.warp_epoch && access.atomic == atomic;
  access = {thread.block->epoch, (same ? access.lanes : 0) | 1u << thread.lane, thread.warp_epoch,
            thread.warp, atomic};
}

// One of the threads behind the access, other than `self`.
std::string who(const Access& access, const Thread& self) {
  const uint32_t others = access.lanes & ~(access.warp == self.warp ? 1u << self.lane : 0u);
  return "thread " + std::to_string(access.warp * kWarpSize + __builtin_ctz(others));
}

enum class Kind { kRead, kWrite, kAtomic };

void look(const void* p, size_t bytes, Kind kind, const void* code) {
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(p) - memory);
  if (at >= kSlots * kSlotSpan || !checks || !running) return;
  const Thread& self = *running;
  const Block& block = *self.block;
  const char* verb = kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
  bool inside = false;
  const size_t offset = at - block.slot * kSlotSpan;  // of another block: beyond every object
  for (const SharedObject& o : block.objects) {
    inside = inside || (offset >= o.offset && offset + bytes <= o.offset + o.bytes);
  }
  if (!inside) {
    fail_at(std::string(verb) + " of " + std::to_string(bytes) +
                " bytes outside the block's shared memory",
            code);
  }
  for (size_t i = at / kGrain; i <= (at + bytes - 1) / kGrain; ++i) {
    Cell& cell = cells[i];
    const auto complain = [&](const std::string& why) {
      fail_at(std::string(verb) + " of shared memory at offset " + std::to_string(offset) + " (" +
                  std::to_string(bytes) + " bytes) " + why,
              code);
    };
    if (kind != Kind::kWrite && cell.run != block.run) complain("that nothing has written");
    const bool atomic = kind == Kind::kAtomic;
    if (bytes >= kGrain) {
      if (unordered(cell.write, self) && !(atomic && cell.write.atomic)) {
        complain("races with a write by " + who(cell.write, self) + ": no barrier between");
      }
      if (kind != Kind::kRead) {
        for (const Access* read : {&cell.read, &cell.other_read}) {
          if (unordered(*read, self) && !(atomic && read->atomic)) {
            complain("races with a read by " + who(*read, self) + ": no barrier between");
          }
        }
      }
    }
    if (kind != Kind::kRead) {
      cell.run = block.run;
      record(cell.write, self, atomic);
    } else {
      if (cell.read.epoch == block.epoch && cell.read.warp != self.warp)
        cell.other_read = cell.read;
      record(cell.read, self, false);
    }
  }
}

}  // namespace

void set_checks(bool on) { checks = on; }

unsigned char* slot_memory(size_t slot) { return memory + slot * kSlotSpan; }

void forget(void* p, size_t bytes) {
  std::memset(p, 0xff, bytes);
  const size_t at = static_cast<size_t>(static_cast<unsigned char*>(p) - memory);
  for (size_t i = at / kGrain; i <= (at + bytes - 1) / kGrain; ++i) cells[i].run = 0;
}

void require_shared(const void* p, size_t align, const char* what) {
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(p) - memory);
  if (at >= kSlots * kSlotSpan)
    fail_at(std::string(what) + ": address is not in shared memory", nullptr);
  if (at % align != 0) {
    fail_at(std::string(what) + ": address not aligned to " + std::to_string(align) + " bytes",
            nullptr);
  }
}

void check_read(const void* p, size_t bytes) {
  look(p, bytes, Kind::kRead, __builtin_return_address(0));
}
void check_write(void* p, size_t bytes) {
  look(p, bytes, Kind::kWrite, __builtin_return_address(0));
}
void check_atomic(void* p, size_t bytes) {
  look(p, bytes, Kind::kAtomic, __builtin_return_address(0));
}

}  // namespace seqkern::emulator

// ---------------------------------------------------------------- what GCC calls

using seqkern::emulator::Kind;
using seqkern::emulator::look;

#define SEQKERN_HOOKS(n)                                   \
  extern "C" void __tsan_read##n(void* p) {                \
    look(p, n, Kind::kRead, __builtin_return_address(0));  \
  }                                                        \
  extern "C" void __tsan_write##n(void* p) {               \
    look(p, n, Kind::kWrite, __builtin_return_address(0)); \
  }
SEQKERN_HOOKS(1)
SEQKERN_HOOKS(2)
SEQKERN_HOOKS(4)
SEQKERN_HOOKS(8)
SEQKERN_HOOKS(16)

extern "C" void __tsan_read_range(void* p, size_t bytes) {
  look(p, bytes, Kind::kRead, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  look(p, bytes, Kind::kWrite, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
