#include "counts.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "ptx.h"
#include "runtime.h"

namespace seqkern::emulator::ptx {

namespace {

constexpr size_t kSector = 32;
constexpr size_t kBanks = 32, kBank = 4;

bool counting = false;

// A warp's lanes at one instruction, the same time around.
struct Together {
  uint32_t lanes = 0;
  std::array<uintptr_t, kWarpSize> at = {};
};

// What lanes of a warp have done at an instruction that others have not yet.
struct Unfinished {
  std::array<size_t, kWarpSize> times = {};
  size_t first = 0;
  std::vector<Together> together;
};

// Of all warps at one instruction.
struct Site {
  size_t bytes = 0;
  bool write = false;
  bool shared = false;
  uint64_t warps = 0;   // that came here
  uint64_t lanes = 0;   // of theirs
  uint64_t passes = 0;  // over the banks, or sectors
  uint64_t least = 0;   // of these, if the same bytes lay side by side
};

struct Counts {
  uint64_t launches = 0;
  std::vector<uint64_t> blocks;  // how often threads ran each
  std::map<const void*, Site> sites;
  uint64_t sectors_read = 0, sectors_written = 0;  // each once a launch
};

std::map<std::string, Counts> kernels;
std::string current;  // empty between launches
Counters counters;    // of it
std::unordered_map<const void*, std::unordered_map<uint64_t, Unfinished>> unfinished;
std::unordered_set<uintptr_t> read_sectors, written_sectors;

// Lanes go together as far as they fill 128 bytes.
uint64_t bank_passes(const Together& t, size_t bytes) {
  const size_t lanes_at_once = std::max<size_t>(1, std::min<size_t>(kWarpSize, 128 / bytes));
  uint64_t passes = 0;
  for (size_t first = 0; first < kWarpSize; first += lanes_at_once) {
    std::array<std::set<uintptr_t>, kBanks> words;
    for (size_t lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(t.lanes >> lane & 1)) continue;
      for (uintptr_t w = t.at[lane] / kBank; w <= (t.at[lane] + bytes - 1) / kBank; ++w)
        words[w % kBanks].insert(w);
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    passes += most;
  }
  return passes;
}

void finish(Site& site, const Together& t) {
  ++site.warps;
  site.lanes += static_cast<uint64_t>(std::popcount(t.lanes));
  std::set<uintptr_t> bytes_of, sectors;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(t.lanes >> lane & 1)) continue;
    bytes_of.insert(t.at[lane]);
    for (uintptr_t s = t.at[lane] / kSector; s <= (t.at[lane] + site.bytes - 1) / kSector; ++s)
      sectors.insert(s);
  }
  if (site.shared) {
    site.passes += bank_passes(t, site.bytes);
    site.least += (bytes_of.size() * site.bytes + 127) / 128;
    return;
  }
  site.passes += sectors.size();
  site.least += (bytes_of.size() * site.bytes + kSector - 1) / kSector;
  for (const uintptr_t s : sectors) (site.write ? written_sectors : read_sectors).insert(s);
}

void end_launch() {
  if (current.empty()) return;
  Counts& counts = kernels[current];
  for (auto& [code, warps] : unfinished) {
    Site& site = counts.sites[code];
    for (auto& [warp, u] : warps) {
      for (size_t i = u.first; i < u.together.size(); ++i) finish(site, u.together[i]);
    }
  }
  counts.blocks.resize(counters.count);
  for (size_t b = 0; b < counters.count; ++b) counts.blocks[b] += counters.first[b];
  ++counts.launches;
  counts.sectors_read += read_sectors.size();
  counts.sectors_written += written_sectors.size();
  unfinished.clear();
  read_sectors.clear();
  written_sectors.clear();
  current.clear();
}

uintptr_t in_library(const void* code) {
  Dl_info info;
  if (!::dladdr(code, &info)) return 0;
  return reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

}  // namespace

void begin_counting(const std::string& kernel, const Counters& of_kernel) {
  if (!counting) return;
  end_launch();
  current = kernel;
  counters = of_kernel;
  std::fill_n(counters.first, counters.count, 0);
}

void count_access(const CountedAccess& access) {
  if (!counting) return;
  Site& site = kernels[current].sites[access.code];
  const auto at = reinterpret_cast<uintptr_t>(access.p);
  site.bytes = access.bytes;
  site.write = access.write;
  site.shared = at - reinterpret_cast<uintptr_t>(slot_memory(0)) < kSlots * kSlotSpan;
  const Thread& self = *running;
  Unfinished& u =
      unfinished[access.code][self.block->number * 64 + static_cast<uint64_t>(self.warp)];
  const size_t time = u.times[self.lane]++;
  if (u.together.size() <= time) u.together.resize(time + 1);
  Together& t = u.together[time];
  t.lanes |= 1u << self.lane;
  t.at[self.lane] = at;
  while (u.first < u.together.size() && u.together[u.first].lanes == 0xffffffffu)
    finish(site, u.together[u.first++]);
}

}  // namespace seqkern::emulator::ptx

#define SEQKERN_EXPORT extern "C" __attribute__((visibility("default")))

// From now on, from zero, or no longer.
SEQKERN_EXPORT void seqkern_ptx_count(int on) {
  using namespace seqkern::emulator::ptx;
  end_launch();
  kernels.clear();
  counting = on != 0;
}

// As JSON; places in the program are offsets in the library.
SEQKERN_EXPORT const char* seqkern_ptx_counts() {
  using namespace seqkern::emulator::ptx;
  static std::string text;
  end_launch();
  std::ostringstream out;
  const char* comma = "";
  out << "[";
  for (const auto& [kernel, counts] : kernels) {
    out << comma << "{\"kernel\": \"" << kernel << "\", \"launches\": " << counts.launches
        << ", \"blocks\": [";
    for (size_t b = 0; b < counts.blocks.size(); ++b) out << (b ? ", " : "") << counts.blocks[b];
    out << "], \"sectors_read\": " << counts.sectors_read
        << ", \"sectors_written\": " << counts.sectors_written << ", \"sites\": [";
    const char* between = "";
    for (const auto& [code, s] : counts.sites) {
      out << between << "{\"at\": " << in_library(code) - 1 << ", \"bytes\": " << s.bytes
          << ", \"write\": " << s.write << ", \"shared\": " << s.shared
          << ", \"warps\": " << s.warps << ", \"lanes\": " << s.lanes
          << ", \"passes\": " << s.passes << ", \"least\": " << s.least << "}";
      between = ", ";
    }
    out << "]}";
    comma = ", ";
  }
  out << "]";
  text = out.str();
  return text.c_str();
}
