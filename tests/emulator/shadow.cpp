// Shared memory and its shadow: who wrote and read each pair of bytes since when. Finds reads of
// memory never written, accesses outside the block's objects, and two threads meeting at an
// address, one of them writing, with no barrier between. Accesses to global memory go to
// global.cpp.
//
// Calls come from the code GCC generates under -fsanitize=thread.
#include <sys/mman.h>

#include <new>
#include <string>

#include "runtime.h"

namespace seqkern::emulator {
namespace {

// Of two bytes: enough for the 16-bit types; races of single bytes are not looked for.
struct Cell {
  uint64_t run = 0;  // the block in which it was written
  Access write;
  Access read;        // the last reading warp
  Access other_read;  // and another one
};
constexpr size_t kGrain = 2;

bool checks = true;
bool looking = false;

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

bool is_shared(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - memory) < kSlots * kSlotSpan;
}

void look_at_shared(const void* p, size_t bytes, Kind kind, size_t align, const void* code) {
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(p) - memory);
  const Thread& self = *running;
  const Block& block = *self.block;
  const char* verb = name(kind);
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
  if (at % align != 0) fail_at(not_aligned(kind, bytes, "shared"), code);
  for (size_t i = at / kGrain; i <= (at + bytes - 1) / kGrain; ++i) {
    Cell& cell = cells[i];
    const auto complain = [&](const std::string& why) {
      fail_at(std::string(verb) + " of shared memory at offset " + std::to_string(offset) + " (" +
                  std::to_string(bytes) + " bytes) " + why,
              code);
    };
    const bool strong = is_strong(kind), writes = is_write(kind);
    if ((!writes || kind == Kind::kAtomic) && cell.run != block.run) {
      complain("that nothing has written");
    }
    if (bytes >= kGrain) {
      if (unordered_in_block(cell.write, self) && !(strong && cell.write.strong)) {
        complain("races with a write by " + who_in_block(cell.write, self) +
                 ": no barrier between");
      }
      if (writes) {
        for (const Access* read : {&cell.read, &cell.other_read}) {
          if (unordered_in_block(*read, self) && !(strong && read->strong)) {
            complain("races with a read by " + who_in_block(*read, self) + ": no barrier between");
          }
        }
      }
    }
    if (writes) {
      cell.run = block.run;
      record(cell.write, self, strong);
    } else {
      if (cell.read.epoch == block.epoch && cell.read.warp != self.warp)
        cell.other_read = cell.read;
      record(cell.read, self, strong);
    }
  }
}

// `align` is what the GPU asks of the address.
void look(const void* p, size_t bytes, Kind kind, size_t align, const void* code) {
  // Of what this calls, some is compiled with the kernels, too.
  if (!checks || !running || looking) return;
  looking = true;
  if (is_shared(p)) {
    look_at_shared(p, bytes, kind, align, code);
  } else {
    look_at_global(p, bytes, kind, align, code);
  }
  looking = false;
}

}  // namespace

bool is_strong(Kind kind) { return kind != Kind::kRead && kind != Kind::kWrite; }
bool is_write(Kind kind) { return kind != Kind::kRead && kind != Kind::kRelaxedRead; }
const char* name(Kind kind) {
  return kind == Kind::kAtomic ? "atomic" : is_write(kind) ? "write" : "read";
}

std::string not_aligned(Kind kind, size_t bytes, const char* memory) {
  return std::string(name(kind)) + " of " + std::to_string(bytes) + " bytes of " + memory +
         " memory at an address not aligned to them";
}

std::string who_in_block(const Access& access, const Thread& self) {
  const uint32_t others = access.lanes & ~(access.warp == self.warp ? 1u << self.lane : 0u);
  return "thread " + std::to_string(access.warp * kWarpSize + __builtin_ctz(others));
}

void end_look() { looking = false; }

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

void check(const void* p, size_t bytes, size_t align, Kind kind, const void* code) {
  look(p, bytes, kind, align, code);
}
void check_read(const void* p, size_t bytes) {
  look(p, bytes, Kind::kRead, 1, __builtin_return_address(0));
}
void check_write(void* p, size_t bytes) {
  look(p, bytes, Kind::kWrite, 1, __builtin_return_address(0));
}

void order_atomic(const void* p) {
  if (running && !is_shared(p)) read_modify_write(*running, p);
}
void order_release(const void* p) { store_flag(*running, p); }
void order_acquire(const void* p) { load_flag(*running, p); }
void thread_fence() { fence(*running); }

}  // namespace seqkern::emulator

// ---------------------------------------------------------------- what GCC calls

using seqkern::emulator::Kind;
using seqkern::emulator::look;

#define SEQKERN_HOOKS(n)                                      \
  extern "C" void __tsan_read##n(void* p) {                   \
    look(p, n, Kind::kRead, n, __builtin_return_address(0));  \
  }                                                           \
  extern "C" void __tsan_write##n(void* p) {                  \
    look(p, n, Kind::kWrite, n, __builtin_return_address(0)); \
  }
SEQKERN_HOOKS(1)
SEQKERN_HOOKS(2)
SEQKERN_HOOKS(4)
SEQKERN_HOOKS(8)
SEQKERN_HOOKS(16)

// Of objects whose parts have alignments of their own.
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  look(p, bytes, Kind::kRead, 1, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  look(p, bytes, Kind::kWrite, 1, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
