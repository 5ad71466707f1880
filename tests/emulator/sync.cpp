// Where threads wait for each other: barriers of block and grid, operations of a warp, and copies
// under way.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "runtime.h"

namespace seqkern::emulator {
namespace {

// Of a wait loop; each round lets every other thread that can run go on.
constexpr uint64_t kMaxYields = 10'000'000;

void make_ready(Thread& thread) {
  thread.waits_in = nullptr;
  thread.waits_for = nullptr;
  launch.ready.push_back(&thread);
}

// Back to the scheduler, until made ready again.
void wait(const char* what, Location where) {
  Thread& self = *running;
  self.waits_in = what;
  self.waits_at = where;
  switch_context(self.context, launch.scheduler);
}

bool same_line(const Location& a, const Location& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void release(Block& block) {
  block.result = block.yes;
  block.arrived = 0;
  block.yes = 0;
  block.barrier = nullptr;
}

// Where collectives lie, so that a kernel's reads of what its lanes brought are told from those of
// global memory.
constexpr size_t kMostCollectives = 65536;
Collective* const collectives = [] {
  void* p = ::mmap(nullptr, kMostCollectives * sizeof(Collective), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Collective*>(p);
}();

// Never destroyed: a fault leaves warps in `launch`, which gives theirs back as the process ends.
std::vector<Collective*>& spare_collectives = *new std::vector<Collective*>;

OwnedCollective take_collective() {
  static size_t made = 0;
  if (spare_collectives.empty()) {
    if (made == kMostCollectives) throw std::bad_alloc();
    return OwnedCollective(collectives + made++);
  }
  OwnedCollective c(spare_collectives.back());
  spare_collectives.pop_back();
  return c;
}
}  // namespace

// ---------------------------------------------------------------- barriers

int block_barrier(const char* what, Location where, Count count, bool predicate) {
  Block& block = *running->block;
  if (block.arrived == 0) {
    block.barrier = what;
    block.barrier_at = where;
  } else if (!same_line(where, block.barrier_at)) {
    fail_at(std::string("mismatched barriers: ") + what + " at " + describe(where) +
                ", while other threads of the block wait in " + block.barrier + " at " +
                describe(block.barrier_at),
            nullptr);
  }
  block.yes += predicate;
  if (++block.arrived < block.threads.size()) {
    wait(what, where);
  } else {
    Thread* self = running;
    release(block);
    meet(block);
    for (Thread* thread : block.threads) {
      if (thread != self) make_ready(*thread);
    }
  }
  const int threads = static_cast<int>(block.threads.size());
  switch (count) {
    case Count::kAnd:
      return block.result == threads;
    case Count::kOr:
      return block.result > 0;
    default:
      return block.result;
  }
}

void grid_barrier(Location where) {
  if (!launch.cooperative)
    fail_at("grid barrier at " + describe(where) + " in a launch that is not cooperative", nullptr);
  if (launch.at_grid_barrier == 0) launch.grid_barrier_at = where;
  if (!same_line(where, launch.grid_barrier_at)) {
    fail_at("mismatched barriers: the grid's at " + describe(where) + " and at " +
                describe(launch.grid_barrier_at),
            nullptr);
  }
  if (++launch.at_grid_barrier < launch.threads.size()) {
    wait("grid_group::sync", where);
    return;
  }
  launch.at_grid_barrier = 0;
  Thread* self = running;
  for (Block& block : launch.blocks) release(block);
  meet_all();
  for (Thread& thread : launch.threads) {
    if (&thread != self) make_ready(thread);
  }
}

void yield() {
  if (++launch.yields > kMaxYields) fail_at("a wait loop never ends", __builtin_return_address(0));
  launch.ready.push_back(running);
  switch_context(running->context, launch.scheduler);
}

// ---------------------------------------------------------------- warps

void GiveBack::operator()(Collective* collective) const { spare_collectives.push_back(collective); }

bool is_collective(uintptr_t at) {
  return at - reinterpret_cast<uintptr_t>(collectives) < kMostCollectives * sizeof(Collective);
}

int lane_id() { return running->lane; }

Collective& arrive(const char* what, uint32_t mask, const void* value, size_t bytes,
                   Location where) {
  Thread& self = *running;
  const uint32_t bit = 1u << self.lane;
  if (!(mask & bit))
    fail_at(std::string(what) + " at " + describe(where) + " by a lane outside its mask", nullptr);
  auto& open = self.block->warps[self.warp];
  Collective* c = nullptr;
  for (const auto& o : open) {
    if (o->arrived == o->mask) continue;  // complete; its lanes are leaving
    if (o->mask == mask && o->what == what && !(o->arrived & bit)) {
      c = o.get();
    } else if (o->mask & mask) {
      fail_at(std::string("lanes of a warp disagree: ") + what + " at " + describe(where) +
                  ", while others wait in " + o->what + " at " + describe(o->where),
              nullptr);
    }
  }
  if (!c) {
    open.push_back(take_collective());
    c = open.back().get();
    c->what = what;
    c->where = where;
    c->mask = mask;
    c->arrived = c->left = 0;
  }
  std::memcpy(c->slots[self.lane], value, bytes);
  c->arrived |= bit;
  if (c->arrived != mask) {
    self.waits_for = c;
    wait(what, where);
    return *c;
  }
  const size_t first = static_cast<size_t>(self.warp) * kWarpSize;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) && lane != self.lane) make_ready(*self.block->threads[first + lane]);
  }
  return *c;
}

void leave(Collective& collective) {
  collective.left |= 1u << running->lane;
  if (collective.left != collective.mask) return;
  auto& open = running->block->warps[running->warp];
  const auto at =
      std::find_if(open.begin(), open.end(), [&](const auto& o) { return o.get() == &collective; });
  open.erase(at);
}

void synchronise_lanes(uint32_t mask) { meet_lanes(*running, mask); }

// ---------------------------------------------------------------- shared memory, asynchronous
// copies

void* static_shared(const void* key, size_t bytes, size_t align) {
  Block& block = *running->block;
  for (const SharedObject& o : block.objects) {
    if (o.key == key) return slot_memory(block.slot) + o.offset;
  }
  const size_t offset = (block.shared_bytes + align - 1) / align * align;
  block.static_bytes += bytes;
  block.shared_bytes = offset + bytes;
  if (block.static_bytes > kStaticLimit || block.shared_bytes > kSharedLimit) {
    fail_at("the block's shared memory is full: " + std::to_string(block.static_bytes) +
                " bytes of shared<>() and " + std::to_string(block.objects[0].bytes) + " dynamic",
            nullptr);
  }
  block.objects.push_back({key, offset, bytes});
  std::memset(slot_memory(block.slot) + offset, 0xff, bytes);
  return slot_memory(block.slot) + offset;
}

void* dynamic_shared() { return slot_memory(running->block->slot); }

void cp_async(void* shared, const void* global, int bytes, int valid, Kind kind) {
  require_shared(shared, static_cast<size_t>(bytes), "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % static_cast<size_t>(bytes) != 0) {
    fail_at("cp.async: source not aligned to its " + std::to_string(bytes) + " bytes", nullptr);
  }
  const void* code = __builtin_return_address(0);
  if (valid > 0) check(global, static_cast<size_t>(valid), 1, kind, code);
  // Written at some time from now on: until the wait nobody may touch it.
  check_write(shared, static_cast<size_t>(bytes));
  forget(shared, static_cast<size_t>(bytes));
  // It may read at any time until then, too.
  AsyncCopy copy = {
      shared, global, bytes, valid, kind, code, running->copy_group, random_bits() % 2 == 0, {}};
  if (copy.early) std::memcpy(copy.read, global, static_cast<size_t>(valid));
  running->copies.push_back(copy);
}

void cp_async_commit() { ++running->copy_group; }

void cp_async_wait(int pending) {
  std::vector<AsyncCopy> later;
  for (const AsyncCopy& c : running->copies) {
    if (c.group >= running->copy_group - pending) {
      later.push_back(c);
      continue;
    }
    if (c.valid > 0) check(c.global, static_cast<size_t>(c.valid), 1, c.kind, c.code);
    check_write(c.shared, static_cast<size_t>(c.bytes));
    std::memset(c.shared, 0, static_cast<size_t>(c.bytes));
    std::memcpy(c.shared, c.early ? c.read : c.global, static_cast<size_t>(c.valid));
  }
  running->copies = std::move(later);
}

}  // namespace seqkern::emulator
