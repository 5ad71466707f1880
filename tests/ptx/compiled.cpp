// Runs the kernels that nvcc compiled, in place of those that g++ did: finds them by name, and does
// for their instructions what the emulator does for CUDA's functions.
#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "counts.h"
#include "ptx.h"
#include "runtime.h"

namespace seqkern::emulator::ptx {
namespace {

// Without the parameters, whose types two compilers may spell in two ways where they depend on the
// kernel's.
std::string short_name(const std::string& name) {
  if (!name.ends_with(')')) return name;
  size_t at = name.size();
  int depth = 0;
  while (at > 0) {
    --at;
    depth += (name[at] == ')') - (name[at] == '(');
    if (depth == 0) break;
  }
  return name.substr(0, at);
}

struct Entry {
  std::string name;
  Kernel kernel;
  Counters counters;
};
std::map<std::string, Entry>& registered() {
  static std::map<std::string, Entry> kernels;
  return kernels;
}

// What the library's functions are called, by their place in it.
std::unordered_map<uintptr_t, std::string> names_in(const std::string& library) {
  std::unordered_map<uintptr_t, std::string> names;
  FILE* pipe = ::popen(("nm -C --defined-only '" + library + "'").c_str(), "r");
  if (!pipe)
    throw std::runtime_error("emulator: nm, of binutils, names the kernels; it does not run");
  char* line = nullptr;
  size_t room = 0;
  while (::getline(&line, &room, pipe) > 0) {
    unsigned long at;
    char kind;
    int from = 0;
    if (std::sscanf(line, "%lx %c %n", &at, &kind, &from) < 2 || !std::strchr("tTwW", kind))
      continue;
    std::string name = line + from;
    name.pop_back();  // the end of the line
    names.emplace(at, std::move(name));
  }
  std::free(line);
  ::pclose(pipe);
  return names;
}

const Entry& look_up(const void* kernel) {
  Dl_info info;
  if (!::dladdr(kernel, &info)) throw std::runtime_error("emulator: a kernel of no library");
  static const auto names = names_in(info.dli_fname);
  const auto at = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  const auto name = names.find(at);
  if (name == names.end()) throw std::runtime_error("emulator: a kernel without a name");
  const auto match = registered().find(short_name(name->second));
  if (match == registered().end())
    throw std::runtime_error("emulator: nvcc has made no " + name->second);
  return match->second;
}

CompiledKernel find(const void* kernel) {
  static std::unordered_map<const void*, const Entry*> found;
  const Entry*& entry = found[kernel];
  if (!entry) entry = &look_up(kernel);
  begin_counting(entry->name, entry->counters);
  return entry->kernel;
}

const bool in_place = [] {
  compiled_kernel = find;
  return true;
}();

// A barrier is one and the same wherever in the program its threads come to it.
constexpr Location kAnywhere = {};

// Where the threads of a cooperative launch count who has come: zeros at first, as the driver
// gives.
alignas(16) unsigned char grid_workspace[64];

}  // namespace

Registered::Registered(const char* name, Kernel kernel, u64* counters, size_t blocks) {
  const Entry entry = {name, kernel, {counters, blocks}};
  const bool is_new = registered().emplace(short_name(name), entry).second;
  // A template of a header comes from each file that uses it, the same from all.
  if (!is_new && std::strstr(name, "(anonymous namespace)")) {
    std::fprintf(stderr, "two kernels are called %s\n", name);
    std::abort();
  }
}

Kernel to_launch(const char* name) {
  const auto found = registered().find(name);
  if (found == registered().end()) return nullptr;
  begin_counting(found->second.name, found->second.counters);
  return found->second.kernel;
}

// ---------------------------------------------------------------- where a thread is

u32 laneid() { return static_cast<u32>(lane_id()); }

namespace {
uint64_t workspace() { return launch.cooperative ? reinterpret_cast<uint64_t>(grid_workspace) : 0; }
}  // namespace
u32 envreg1() { return static_cast<u32>(workspace() >> 32); }
u32 envreg2() { return static_cast<u32>(workspace()); }

// ---------------------------------------------------------------- memory

unsigned char* shared_window() { return static_cast<unsigned char*>(dynamic_shared()); }

u32 static_shared(const unsigned char* window, const void* key, size_t bytes, size_t align) {
  const auto* p = static_cast<unsigned char*>(emulator::static_shared(key, bytes, align));
  return static_cast<u32>(p - window);
}

#define SEQKERN_HERE __builtin_return_address(0)

void weak_read(void* p, size_t bytes) {
  count_access({p, bytes, false, SEQKERN_HERE});
  check(p, bytes, bytes, Kind::kRead, SEQKERN_HERE);
}
void weak_write(void* p, size_t bytes) {
  count_access({p, bytes, true, SEQKERN_HERE});
  check(p, bytes, bytes, Kind::kWrite, SEQKERN_HERE);
}
void relaxed_read(void* p, size_t bytes) {
  yield();
  count_access({p, bytes, false, SEQKERN_HERE});
  check(p, bytes, bytes, Kind::kRelaxedRead, SEQKERN_HERE);
}
void acquire_read(void* p, size_t bytes) {
  yield();
  check(p, bytes, bytes, Kind::kRelaxedRead, SEQKERN_HERE);
  order_acquire(p);
}
void relaxed_write(void* p, size_t bytes) {
  count_access({p, bytes, true, SEQKERN_HERE});
  check(p, bytes, bytes, Kind::kRelaxedWrite, SEQKERN_HERE);
}
void release_write(void* p, size_t bytes) {
  check(p, bytes, bytes, Kind::kRelaxedWrite, SEQKERN_HERE);
  order_release(p);
}

void before_atomic(void* p, size_t bytes, Order order) {
  if (order == Order::k_release || order == Order::k_acq_rel) thread_fence();
  check(p, bytes, bytes, Kind::kAtomic, SEQKERN_HERE);
  order_atomic(p);
}
void after_atomic(Order order) {
  if (order == Order::k_acquire || order == Order::k_acq_rel) thread_fence();
}

// Whether others may store meanwhile what it reads, the instruction does not say: that is for the
// sources' own run (Copied in csrc/cuda/ptx.cuh).
void cp_async(unsigned char* shared, const unsigned char* global, int bytes, int valid) {
  if (valid > 0) count_access({global, static_cast<size_t>(bytes), false, SEQKERN_HERE});
  count_access({shared, static_cast<size_t>(bytes), true, SEQKERN_HERE});
  emulator::cp_async(shared, global, bytes, valid, bytes == 16 ? Kind::kRelaxedRead : Kind::kRead);
}

// ---------------------------------------------------------------- waiting

void bar_sync(u64 barrier) {
  if (barrier != 0) fail("a barrier of another number than 0");
  block_barrier("bar.sync", kAnywhere);
}
void bar_sync(u64 barrier, u64 threads) {
  if (threads != running->block->threads.size()) fail("a barrier of part of the block");
  bar_sync(barrier);
}
void bar_warp_sync(u64 mask) {
  const auto lanes = static_cast<u32>(mask);
  warp_collective("bar.warp.sync", 0, [](const Lanes<int>&, int) {}, lanes, kAnywhere);
  synchronise_lanes(lanes);
}
void membar_gl() { thread_fence(); }
void trap() { fail_at("trap", SEQKERN_HERE); }

// ---------------------------------------------------------------- warps

u32 shuffle(const char* mode, bool& inside, u32 x, u32 b, u32 c, u32 mask) {
  struct Brought {
    u32 x, b, c;
  };
  return warp_collective(
      mode, Brought{x, b, c},
      [&](const Lanes<Brought>& lanes, int lane) {
        // As the ISA's pseudo-code: segments of a width, and how far in them to go.
        const int by = static_cast<int>(b & 31), clamp = static_cast<int>(c & 31);
        const int segment = static_cast<int>(c >> 8 & 31);
        const int last = (lane & segment) | (clamp & ~segment);
        const int first = lane & segment;
        int from = lane;
        switch (mode[0]) {
          case 'u':
            from = lane - by;
            inside = from >= last;
            break;
          case 'd':
            from = lane + by;
            inside = from <= last;
            break;
          case 'b':
            from = lane ^ by;
            inside = from <= last;
            break;
          default:
            from = first | (by & ~segment);
            inside = from <= last;
        }
        if (!inside) from = lane;
        if (!(mask >> from & 1)) fail("shfl.sync reads a lane outside its mask");
        return lanes[from].x;
      },
      mask, kAnywhere);
}

u32 reduce(u32 x, u32 mask, u32 (*merge)(u32, u32)) {
  return warp_collective(
      "redux.sync", x,
      [&](const Lanes<u32>& lanes, int lane) {
        u32 y = lanes[lane];
        for (int l = 0; l < kWarpSize; ++l) {
          if (l != lane && (mask >> l & 1)) y = merge(y, lanes[l]);
        }
        return y;
      },
      mask, kAnywhere);
}

u32 ballot(bool predicate, u32 mask) {
  return warp_collective(
      "vote.sync", predicate,
      [&](const Lanes<bool>& lanes, int) {
        u32 bits = 0;
        for (int l = 0; l < kWarpSize; ++l) bits |= u32{(mask >> l & 1) && lanes[l]} << l;
        return bits;
      },
      mask, kAnywhere);
}

Tile load_matrices(int at, const unsigned char* row, bool transpose, int count) {
  struct Brought {
    const unsigned char* row;
    int at;
  };
  require_shared(row, 16, "ldmatrix");
  const void* code = SEQKERN_HERE;
  // A lane brings the row of one matrix; each matrix takes a pass.
  if (lane_id() < 8 * count) count_access({row, 16, false, code});
  return warp_collective(
      "ldmatrix.sync", Brought{row, at},
      [&](const Lanes<Brought>& lanes, int lane) {
        Tile tile = {};
        for (int l = 0; l < kWarpSize; ++l) {
          if (lanes[l].at != at)
            fail_at("ldmatrix: the lanes of a warp are at different instructions", code);
        }
        for (int j = 0; j < count; ++j) {
          for (int i = 0; i < 2; ++i) {
            const int r = transpose ? 2 * (lane % 4) + i : lane / 4;
            const int column = transpose ? lane / 4 : 2 * (lane % 4) + i;
            const unsigned char* p = lanes[8 * j + r].row + 2 * column;
            check(p, 2, 2, Kind::kRead, code);
            tile.x[j] |= u32{load<u16, 1>(p)[0]} << (16 * i);
          }
        }
        return tile;
      },
      0xffffffffu, kAnywhere);
}

}  // namespace seqkern::emulator::ptx
