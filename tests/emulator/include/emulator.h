// The emulator as device code sees it: where a thread waits, and what it shares with others.
//
// Every CUDA thread is a fiber of the one OS thread that launched the kernel (emulator.cpp). The
// files of csrc/cuda are compiled with -fsanitize=thread for the calls GCC then makes at each
// memory access, which shadow.cpp answers; the sanitizer's own runtime is not linked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#include "common/dtype.h"

namespace seqkern::emulator {

using Location = std::source_location;

// For functions that report their accesses themselves.
#define SEQKERN_EMULATOR_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

// ---------------------------------------------------------------- control (host)

// The order of fibers follows from the seed; the launches since it was set each draw a new order.
void set_seed(uint64_t seed);

// What kernels that ask are told of the device, and what cooperative launches must fit on.
struct EmulatedDevice {
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;  // that one block may ask for
  bool cooperative = true;
  bool known = true;  // to those who compiled the kernels
};
void set_device(const EmulatedDevice& device);

// Without checks of shared memory, a fault shows only in results: for the emulator's own tests.
void set_checks(bool on);

// ---------------------------------------------------------------- faults

// Ends the launch: the host's launch call throws std::runtime_error with the message and the
// thread.
[[noreturn]] void fail(const char* message);

// ---------------------------------------------------------------- synchronisation

enum class Count { kNone, kAnd, kOr, kSum };

// Waits for every thread of the block; all must wait at the same line.
int block_barrier(const char* what, Location where, Count count = Count::kNone,
                  bool predicate = false);
void grid_barrier(Location where);
// Lets others run, for loops that wait for a value in memory.
void yield();

// ---------------------------------------------------------------- warps

inline constexpr int kWarpSize = 32;
inline constexpr int kSlotBytes = 64;

struct Collective {
  const char* what;
  Location where;
  uint32_t mask;
  uint32_t arrived;
  uint32_t left;
  alignas(16) unsigned char slots[kWarpSize][kSlotBytes];
};

int lane_id();
// Waits until all lanes of the mask have come to the same operation with the same mask.
Collective& arrive(const char* what, uint32_t mask, const void* value, size_t bytes,
                   Location where);
void leave(Collective& collective);
void synchronise_lanes(uint32_t mask);

// The values the lanes brought.
template <class X>
class Lanes {
 public:
  explicit Lanes(const Collective& collective) : collective_(collective) {}
  X operator[](int lane) const {
    X x;
    __builtin_memcpy(&x, collective_.slots[lane], sizeof(X));
    return x;
  }

 private:
  const Collective& collective_;
};

// f(lanes, lane) once every lane has brought its value.
template <class X, class F>
decltype(auto) warp_collective(const char* what, const X& value, F&& f, uint32_t mask = 0xffffffffu,
                               Location where = Location::current()) {
  static_assert(sizeof(X) <= kSlotBytes && std::is_trivially_copyable_v<X>);
  Collective& collective = arrive(what, mask, &value, sizeof(X), where);
  const Lanes<X> lanes(collective);
  if constexpr (std::is_void_v<std::invoke_result_t<F, const Lanes<X>&, int>>) {
    f(lanes, lane_id());
    leave(collective);
  } else {
    const auto result = f(lanes, lane_id());
    leave(collective);
    return result;
  }
}

// ---------------------------------------------------------------- memory

// The block's object under this key, filled with NaN bytes when the block begins.
void* static_shared(const void* key, size_t bytes, size_t align);
void* dynamic_shared();

// What kernels may touch from begin_op() to end_op() of what is global memory to them, if anything
// is said of it.
void begin_op();
void end_op();
void allow(const void* p, size_t bytes, bool writable);

// Relaxed accesses are of what others write meanwhile.
enum class Kind { kRead, kWrite, kRelaxedRead, kRelaxedWrite, kAtomic };

void require_shared(const void* p, size_t align, const char* what);
// `code` is where in the program.
void check(const void* p, size_t bytes, size_t align, Kind kind, const void* code);
void check_read(const void* p, size_t bytes);
void check_write(void* p, size_t bytes);

// What an atomic, a store that releases and a load that acquires do to the order of accesses.
void order_atomic(const void* p);
void order_release(const void* p);
void order_acquire(const void* p);
void thread_fence();

template <class X>
SEQKERN_EMULATOR_UNWATCHED X load_shared(const X* p) {
  check_read(p, sizeof(X));
  return *p;
}

template <class X>
SEQKERN_EMULATOR_UNWATCHED X load_relaxed(const X* p) {
  check(p, sizeof(X), sizeof(X), Kind::kRelaxedRead, __builtin_return_address(0));
  return *p;
}
template <class X>
SEQKERN_EMULATOR_UNWATCHED void store_relaxed(X* p, X x) {
  check(p, sizeof(X), sizeof(X), Kind::kRelaxedWrite, __builtin_return_address(0));
  *p = x;
}
template <class X>
X load_acquire(const X* p) {
  order_acquire(p);
  return load_relaxed(p);
}
template <class X>
void store_release(X* p, X x) {
  order_release(p);
  store_relaxed(p, x);
}

// old = *p, *p = f(old); returns old. Fibers do not interrupt each other, so nothing else is
// needed.
template <class X, class F>
SEQKERN_EMULATOR_UNWATCHED X atomic_update(X* p, F f) {
  check(p, sizeof(X), sizeof(X), Kind::kAtomic, __builtin_return_address(0));
  order_atomic(p);
  const X old = *p;
  *p = f(old);
  return old;
}

void cp_async(void* shared, const void* global, int bytes, int valid, Kind kind);
void cp_async_commit();
void cp_async_wait(int pending);

// ---------------------------------------------------------------- 16-bit floats

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);  // round to nearest even
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float x);

// Element 0 (low half) or 1 of a register holding two elements of type T.
template <class T>
float half_of(uint32_t bits, int which) {
  const auto element = static_cast<uint16_t>(bits >> (16 * which));
  return std::is_same_v<T, BFloat16> ? bfloat16_to_float(element) : half_to_float(element);
}

}  // namespace seqkern::emulator
