// The scheduler: runs the threads of a launch in random order, each until it waits or returns.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "runtime.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace seqkern::emulator {

CompiledKernel (*compiled_kernel)(const void* kernel) = nullptr;
Thread* running = nullptr;
Launch launch;

namespace {

constexpr size_t kMaxAliveThreads = 16384;
// Of a slow block's threads: one turn in so many is theirs, and for whose turn it is a thread is
// looked for so often.
constexpr unsigned kSlowness = 32;
constexpr int kTries = 16;

EmulatedDevice device;
Call launched = {};

uint64_t random_state = 0;
uint64_t launches = 0;

const bool seeded = [] {
  const char* seed = std::getenv("SEQKERN_EMU_SEED");
  set_seed(seed ? std::strtoull(seed, nullptr, 0) : 0);
  return true;
}();

std::string name(uint3 i) {
  std::ostringstream out;
  out << "(" << i.x << ", " << i.y << ", " << i.z << ")";
  return out.str();
}

// file:line of a code address through binutils, where g++ is, that is; else the address in its
// library.
std::string describe_code(const void* code) {
  if (!code) return "";
  std::string library;
  uintptr_t base = 0;
  const auto address = reinterpret_cast<uintptr_t>(code);
  if (FILE* maps = std::fopen("/proc/self/maps", "r")) {
    char line[4608], path[4096];
    while (std::fgets(line, sizeof(line), maps)) {
      unsigned long begin, end, offset;
      if (std::sscanf(line, "%lx-%lx %*s %lx %*s %*s %4095s", &begin, &end, &offset, path) != 4)
        continue;
      if (offset == 0) {
        base = begin;
        library = path;
      }
      if (address >= begin && address < end) break;
    }
    std::fclose(maps);
  }
  std::ostringstream out;
  out << std::hex << "0x" << address - base - 1;
  const std::string offset = out.str();
  const std::string command = "addr2line -e '" + library + "' " + offset + " 2>/dev/null";
  std::string found;
  if (FILE* pipe = ::popen(command.c_str(), "r")) {
    char line[4096];
    while (std::fgets(line, sizeof(line), pipe)) found += line;
    ::pclose(pipe);
  }
  found = found.substr(0, found.find_first_of(" \n"));
  if (found.empty() || found[0] == '?') return " at " + library + "+" + offset;
  return " at " + found.substr(found.rfind('/') + 1);
}

void thread_entry() noexcept {
  (*launch.body)();
  running->done = true;
  ++launch.done;
  for (;;) switch_context(running->context, launch.scheduler);
}

void resume(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  switch_context(launch.scheduler, thread.context);
  running = nullptr;
}

// Nobody can run and not all have returned: who waits where.
std::string deadlock() {
  std::ostringstream out;
  for (const Block& block : launch.blocks) {
    struct Group {
      std::string what;
      const Thread* first;
      size_t count;
    };
    std::vector<Group> groups;
    for (const Thread* thread : block.threads) {
      std::string what = "returned";
      if (!thread->done)
        what = std::string("wait in ") + thread->waits_in + " at " + describe(thread->waits_at);
      if (const Collective* c = thread->waits_for) {
        std::ostringstream lanes;
        lanes << what << " (mask 0x" << std::hex << c->mask << ", arrived 0x" << c->arrived << ")";
        what = lanes.str();
      }
      const auto same = std::find_if(groups.begin(), groups.end(),
                                     [&](const Group& g) { return g.what == what; });
      if (same == groups.end()) {
        groups.push_back({what, thread, 1});
      } else {
        ++same->count;
      }
    }
    if (groups.size() == 1 && groups[0].what == "returned") continue;
    out << "not all threads reach the same barrier: block " << name(block.index) << ":";
    for (const Group& g : groups) {
      out << " " << g.count << (g.what == "returned" ? " have " : " ") << g.what
          << " (first: thread " << name(g.first->index) << ");";
    }
    break;  // one block says it
  }
  return out.str();
}

Thread& take_ready() {
  const bool slow = launch.slow && random_bits() % kSlowness == 0;
  for (int tries = launch.slow ? kTries : 1; tries > 0; --tries) {
    std::swap(launch.ready[random_bits() % launch.ready.size()], launch.ready.back());
    if ((launch.ready.back()->block == launch.slow) == slow) break;
  }
  Thread& thread = *launch.ready.back();
  launch.ready.pop_back();
  return thread;
}

void run_alive() {
  launch.fault.reset();
  while (!launch.ready.empty()) {
    Thread& thread = take_ready();
    resume(thread);
    if (launch.fault) {
      throw std::runtime_error("emulator: block " + name(thread.block->index) + " thread " +
                               name(thread.index) + ": " + launch.fault->message +
                               describe_code(launch.fault->code));
    }
  }
  if (launch.done != launch.threads.size()) throw std::runtime_error("emulator: " + deadlock());
}

// Lays out the given blocks of the grid as alive, and runs them to the end.
void run_blocks(const cudaLaunchConfig_t& config, const std::vector<uint64_t>& indices) {
  const dim3& grid = config.gridDim;
  const dim3& dim = config.blockDim;
  const size_t threads = size_t{dim.x} * dim.y * dim.z;
  launch.blocks.clear();
  launch.blocks.resize(indices.size());
  launch.threads.resize(indices.size() * threads);
  launch.ready.clear();
  launch.done = 0;
  launch.at_grid_barrier = 0;
  launch.yields = 0;
  for (size_t b = 0; b < indices.size(); ++b) {
    Block& block = launch.blocks[b];
    const uint64_t i = indices[b];
    block.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)};
    block.number = static_cast<uint32_t>(i);
    block.slot = b;
    block.run = next_epoch();
    block.epoch = next_epoch();
    block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
    block.objects.push_back({nullptr, 0, config.dynamicSmemBytes});
    block.shared_bytes = config.dynamicSmemBytes;
    std::memset(slot_memory(b), 0xff, config.dynamicSmemBytes);
    for (size_t t = 0; t < threads; ++t) {
      Thread& thread = launch.threads[b * threads + t];
      thread = Thread{};
      thread.block = &block;
      thread.index = {static_cast<unsigned>(t % dim.x), static_cast<unsigned>(t / dim.x % dim.y),
                      static_cast<unsigned>(t / dim.x / dim.y)};
      thread.warp = static_cast<int>(t / kWarpSize);
      thread.lane = static_cast<int>(t % kWarpSize);
      thread.stack = stack(b * threads + t);
      prepare(thread.context, thread.stack, thread_entry);
      block.threads.push_back(&thread);
      launch.ready.push_back(&thread);
    }
  }
  // Half of the launches of several blocks have a slow one: what the others do meanwhile, when a
  // block is held up, is rare in a fair order.
  launch.slow = indices.size() > 1 && random_bits() % 2
                    ? &launch.blocks[random_bits() % indices.size()]
                    : nullptr;
  run_alive();
}

// Blocks of a cooperative launch that fit on the device at once, by threads and by shared memory.
uint64_t resident_blocks(uint64_t threads, size_t shared_bytes) {
  constexpr uint64_t kThreads = 2048, kBlocks = 32;  // of a multiprocessor
  uint64_t blocks =
      std::min(kBlocks, kThreads / ((threads + kWarpSize - 1) / kWarpSize * kWarpSize));
  if (shared_bytes > 0)
    blocks = std::min<uint64_t>(blocks, static_cast<size_t>(device.shared_bytes) / shared_bytes);
  return blocks * static_cast<uint64_t>(device.multiprocessors);
}

std::unordered_map<const void*, size_t>& dynamic_limits() {
  static std::unordered_map<const void*, size_t> limits;
  return limits;
}

}  // namespace

// ---------------------------------------------------------------- launch

void set_device(const EmulatedDevice& wanted) { device = wanted; }

void set_seed(uint64_t seed) { random_state = seed * 0x2545f4914f6cdd1du + 1; }

uint64_t random_bits() {
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel,
                     const std::function<void()>& thread, Call call) {
  // One launch at a time: autograd may call from another thread.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (!device.known) return cudaErrorNoKernelImageForDevice;
  const dim3& grid = config.gridDim;
  const dim3& dim = config.blockDim;
  const uint64_t threads = uint64_t{dim.x} * dim.y * dim.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || dim.z > 64 || blocks == 0 || grid.x > 0x7fffffff ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = dynamic_limits().find(kernel);
  if (config.dynamicSmemBytes > (limit == dynamic_limits().end() ? kStaticLimit : limit->second) ||
      config.dynamicSmemBytes > static_cast<size_t>(device.shared_bytes)) {
    return cudaErrorInvalidValue;
  }
  launch.cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative)
      launch.cooperative = config.attrs[i].val.cooperative;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      throw std::runtime_error("emulator: clusters are not emulated");
    }
  }
  launch.body = &thread;
  launched = call;
  begin_launch();
  forget_old_pages();
  blockDim = dim;
  gridDim = grid;
  ++launches;
  // Blocks of an ordinary launch may run one after the other in any order; those of a cooperative
  // one must be alive together.
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  if (launch.cooperative) {
    if (!device.cooperative) return cudaErrorNotSupported;
    if (blocks * threads > kMaxAliveThreads || blocks > kSlots ||
        blocks > resident_blocks(threads, config.dynamicSmemBytes))
      return cudaErrorCooperativeLaunchTooLarge;
    run_blocks(config, order);
  } else {
    for (const uint64_t block : order) run_blocks(config, {block});
  }
  return cudaSuccess;
}

bool is_parameter(uintptr_t at) {
  return at - reinterpret_cast<uintptr_t>(launched.data) < launched.bytes ||
         at - reinterpret_cast<uintptr_t>(launch.body) < sizeof(*launch.body);
}

void fail_at(const std::string& message, const void* code) {
  launch.fault = std::make_unique<Fault>(Fault{message, code});
  end_look();
  for (;;) switch_context(running->context, launch.scheduler);
}

void fail(const char* message) { fail_at(message, __builtin_return_address(0)); }

std::string describe(const Location& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

uint64_t next_epoch() {
  static uint64_t epoch = 0;
  return ++epoch;
}

}  // namespace seqkern::emulator

// ---------------------------------------------------------------- C interface

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

namespace {
int compute_capability_major = 8;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = seqkern::emulator::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = compute_capability_major;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = device.cooperative;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > seqkern::emulator::device.shared_bytes) return cudaErrorInvalidValue;
  seqkern::emulator::dynamic_limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

#define SEQKERN_EXPORT extern "C" __attribute__((visibility("default")))
SEQKERN_EXPORT void seqkern_emu_set_seed(uint64_t seed) { seqkern::emulator::set_seed(seed); }
SEQKERN_EXPORT uint64_t seqkern_emu_launches() { return seqkern::emulator::launches; }
SEQKERN_EXPORT void seqkern_emu_set_device(int multiprocessors, int shared_bytes, int cooperative) {
  seqkern::emulator::set_device({multiprocessors, shared_bytes, cooperative != 0, true});
}

// So that tests reach what runs on older GPUs.
SEQKERN_EXPORT void seqkern_emu_set_compute_capability(int major) {
  compute_capability_major = major;
}
