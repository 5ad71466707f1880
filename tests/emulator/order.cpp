#include "order.h"

#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace seqkern::emulator {
namespace {

// What comes with the value at an address to those who acquire it.
std::unordered_map<const void*, Known> messages;

Position position(const Thread& self) {
  return {self.block->epoch, 1u << self.lane,    self.warp_epoch,
          self.releases,     self.block->number, static_cast<int16_t>(self.warp)};
}

// Whether all that comes before b comes before a.
bool later(const Position& a, const Position& b) {
  if (a.block != b.block || a.epoch != b.epoch) return a.block == b.block && a.epoch > b.epoch;
  if (a.warp != b.warp || a.warp_epoch != b.warp_epoch) {
    return a.warp == b.warp && a.warp_epoch > b.warp_epoch;
  }
  return (b.lanes & ~a.lanes) == 0 && a.releases >= b.releases;
}

void learn(Known& known, const Position& more) {
  for (Position& p : known) {
    if (later(p, more)) return;
    if (p.block == more.block && p.epoch == more.epoch && p.warp == more.warp &&
        p.warp_epoch == more.warp_epoch && p.releases == more.releases) {
      p.lanes |= more.lanes;
      return;
    }
  }
  std::erase_if(known, [&](const Position& p) { return later(more, p); });
  known.push_back(more);
}

bool covers(const Position& p, const Access& a) {
  if (p.block != a.block) return false;
  if (a.epoch != p.epoch) return a.epoch < p.epoch;
  if (a.warp != p.warp) return false;
  if (a.warp_epoch != p.warp_epoch) return a.warp_epoch < p.warp_epoch;
  return (a.lanes & ~p.lanes) == 0 && a.releases <= p.releases;
}

bool covers(const Known& known, const Access& a) {
  return std::any_of(known.begin(), known.end(), [&](const Position& p) { return covers(p, a); });
}

Known all_known(const Thread& self) {
  Known known = self.block->known;
  learn(known, self.known);
  learn(known, position(self));
  return known;
}

void gather(Known& of_block, Known& of_thread) {
  if (of_thread.empty()) return;
  learn(of_block, of_thread);
  of_thread.clear();
}

}  // namespace

void learn(Known& known, const Known& more) {
  for (const Position& p : more) learn(known, p);
}

bool unordered_in_block(const Access& before, const Thread& now) {
  if (before.epoch != now.block->epoch) return false;
  if (before.warp != now.warp) return true;
  return before.warp_epoch >= now.warp_epoch && (before.lanes & ~(1u << now.lane)) != 0;
}

bool unordered(const Access& before, const Thread& now) {
  if (before.epoch < launch.all_known_before) return false;
  if (before.block == now.block->number && !unordered_in_block(before, now)) return false;
  return !covers(now.known, before) && !covers(now.block->known, before);
}

void record(Access& access, const Thread& thread, bool strong) {
  const bool same = access.epoch == thread.block->epoch && access.warp == thread.warp &&
                    access.warp_epoch == thread.warp_epoch && access.strong == strong;
  access = {thread.block->epoch,
            (same ? access.lanes : 0) | 1u << thread.lane,
            thread.warp_epoch,
            thread.releases,
            thread.block->number,
            static_cast<int16_t>(thread.warp),
            strong};
}

void meet(Block& block) {
  for (Thread* thread : block.threads) {
    gather(block.known, thread->known);
    gather(block.heard, thread->heard);
    gather(block.fenced, thread->fenced);
  }
  block.epoch = next_epoch();
}

void meet_all() {
  launch.all_known_before = next_epoch();
  for (Block& block : launch.blocks) {
    meet(block);
    block.known.clear();
  }
}

void meet_lanes(Thread& self, uint32_t mask) {
  const size_t first = static_cast<size_t>(self.warp) * kWarpSize;
  uint32_t epoch = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = *self.block->threads[first + lane];
    epoch = std::max(epoch, other.warp_epoch);
    if (&other != &self && !other.known.empty()) learn(self.known, other.known);
  }
  self.warp_epoch = epoch + 1;
}

void begin_launch() {
  launch.all_known_before = next_epoch();
  messages.clear();
}

// Sequentially consistent, so that a barrier between it and the atomic, or back, does not break the
// pair.
void fence(Thread& self) {
  learn(self.known, self.heard);
  learn(self.known, self.block->heard);
  self.heard.clear();
  self.fenced = all_known(self);
  ++self.releases;
}

void read_modify_write(Thread& self, const void* p) {
  Known& message = messages[p];
  learn(self.heard, message);
  learn(message, self.fenced);
  learn(message, self.block->fenced);
}

void store_flag(Thread& self, const void* p) {
  messages[p] = all_known(self);
  ++self.releases;
}

void load_flag(Thread& self, const void* p) { learn(self.known, messages[p]); }

}  // namespace seqkern::emulator
