// Global memory: what a kernel may touch of it, and who wrote and read each pair of bytes. Finds
// accesses outside the tensors of an op, writes to its inputs, addresses not aligned as the GPU
// asks, and two threads meeting at an address, one of them writing, with nothing that orders them
// (order.h).
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <new>
#include <string>
#include <unordered_map>

#include "runtime.h"

namespace seqkern::emulator {
namespace {

// ---------------------------------------------------------------- regions

struct Region {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
};

// Of the ops that this thread is in.
thread_local std::vector<Region> regions;
thread_local int ops = 0;

// The library's own code and data: tables of kernels, threadIdx and its like.
Region own_library() {
  Region found;
  ::dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        Region r = {UINTPTR_MAX, 0, true};
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          r.begin = std::min<uintptr_t>(r.begin, info->dlpi_addr + segment.p_vaddr);
          r.end = std::max<uintptr_t>(r.end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
        }
        const auto here = reinterpret_cast<uintptr_t>(&own_library);
        if (here < r.begin || here >= r.end) return 0;
        *static_cast<Region*>(result) = r;
        return 1;
      },
      &found);
  return found;
}
const Region library = own_library();

bool within(const Region& r, uintptr_t at, size_t bytes) {
  return at >= r.begin && at + bytes <= r.end;
}

// Not global memory: what stands for registers, for constant memory and for the kernel's
// parameters.
bool is_own(uintptr_t at, const Thread& self) {
  const auto stack = reinterpret_cast<uintptr_t>(self.stack);
  return (at >= stack && at < stack + kStackBytes) || within(library, at, 1) || is_parameter(at) ||
         is_collective(at);
}

std::string place(uintptr_t at, size_t bytes) {
  const Region* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Region& r : regions) {
    const uintptr_t distance = at >= r.end ? at - r.end : at + bytes > r.begin ? 0 : r.begin - at;
    if (distance < least) {
      least = distance;
      nearest = &r;
    }
  }
  const std::string size = std::to_string(nearest->end - nearest->begin);
  const auto offset = static_cast<intptr_t>(at - nearest->begin);
  return "offset " + std::to_string(offset) + " of a tensor of " + size + " bytes";
}

// ---------------------------------------------------------------- shadow

constexpr size_t kGrain = 2;  // races of single bytes are not looked for

// The last warp to do it, and another one, of another block if there was one.
struct Accesses {
  Access last, other;
};
struct Cell {
  Accesses writes;  // two only where both are strong
  Accesses reads;
};

constexpr size_t kPageBytes = 4096;
constexpr size_t kMostPages = 1024;  // 4 MB of tensors; then all is forgotten between launches
using Page = std::array<Cell, kPageBytes / kGrain>;

std::unordered_map<uintptr_t, Page*> pages;
// A few of them, by address.
struct Recent {
  uintptr_t number = 0;
  Page* page = nullptr;
};
std::array<Recent, 64> recent;

Page& page_of(uintptr_t at) {
  const uintptr_t number = at / kPageBytes;
  Recent& r = recent[number % recent.size()];
  if (r.page && r.number == number) return *r.page;
  Page*& page = pages[number];
  if (!page) {
    // Zeros are accesses of long ago.
    void* p =
        ::mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    page = static_cast<Page*>(p);
  }
  r = {number, page};
  return *page;
}

// Another thread behind the access.
std::string who(const Access& access, const Thread& self) {
  if (access.block == self.block->number) return who_in_block(access, self);
  return "thread " + std::to_string(access.warp * kWarpSize + __builtin_ctz(access.lanes)) +
         " of block " + std::to_string(access.block);
}

void keep(Accesses& accesses, const Thread& self, bool strong) {
  const Access& last = accesses.last;
  const bool other_block = last.block != self.block->number;
  const bool no_better =
      accesses.other.block == self.block->number || accesses.other.epoch < launch.all_known_before;
  if (other_block || (last.warp != self.warp && no_better)) accesses.other = last;
  record(accesses.last, self, strong);
}

void look_for_races(uintptr_t at, size_t bytes, Kind kind, const void* code) {
  const Thread& self = *running;
  const bool strong = is_strong(kind), writes = is_write(kind);
  for (uintptr_t i = at / kGrain; i <= (at + bytes - 1) / kGrain; ++i) {
    Cell& cell = page_of(i * kGrain)[i % (kPageBytes / kGrain)];
    const auto check = [&](const Accesses& accesses, const char* what) {
      for (const Access* access : {&accesses.last, &accesses.other}) {
        if ((strong && access->strong) || !unordered(*access, self)) continue;
        fail_at(std::string(name(kind)) + " of global memory races with a " + what + " by " +
                    who(*access, self) + ": nothing orders them",
                code);
      }
    };
    check(cell.writes, "write");
    if (writes) {
      check(cell.reads, "read");
      if (!strong) cell.writes = {};  // all come before it
      keep(cell.writes, self, strong);
    } else {
      keep(cell.reads, self, strong);
    }
  }
}

}  // namespace

void begin_op() { ++ops; }

void end_op() {
  if (--ops == 0) regions.clear();
}

void allow(const void* p, size_t bytes, bool writable) {
  if (ops == 0 || bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (Region& r : regions) {
    if (r.begin == begin && r.end == begin + bytes) {
      r.writable = r.writable || writable;
      return;
    }
  }
  regions.push_back({begin, begin + bytes, writable});
}

void forget_old_pages() {
  if (pages.size() < kMostPages) return;
  for (const auto& [number, page] : pages) ::munmap(page, sizeof(Page));
  pages.clear();
  recent.fill({});
}

void look_at_global(const void* p, size_t bytes, Kind kind, size_t align, const void* code) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (bytes == 0 || is_own(at, *running)) return;
  if (!regions.empty()) {
    bool inside = false, writable = false;
    for (const Region& r : regions) {
      if (!within(r, at, bytes)) continue;
      inside = true;
      writable = writable || r.writable;
    }
    const auto complain = [&](const char* what) {
      fail_at(std::string(name(kind)) + " of " + std::to_string(bytes) +
                  " bytes of global memory " + what + ": " + place(at, bytes),
              code);
    };
    if (!inside) complain("outside the op's tensors");
    if (is_write(kind) && !writable) complain("that the op only reads");
  }
  if (at % align != 0) fail_at(not_aligned(kind, bytes, "global"), code);
  if (bytes >= kGrain) look_for_races(at, bytes, kind, code);
}

}  // namespace seqkern::emulator
