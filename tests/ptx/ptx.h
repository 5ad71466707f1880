// What a kernel that translate.py turned into C++ consists of: instructions on registers
// (integers.h, floats.h), memory, waiting and warps, which are the emulator's.
#pragma once

#include <cstring>

#include "cuda_runtime.h"
#include "emulator.h"
#include "floats.h"
#include "integers.h"
#include "registers.h"

namespace seqkern::emulator::ptx {

// ---------------------------------------------------------------- where a thread is

u32 laneid();
// The high and low half of where a grid barrier keeps its count.
u32 envreg1();
u32 envreg2();

// ---------------------------------------------------------------- memory

// The block's shared memory begins here; addresses in it are 32 bits from there.
unsigned char* shared_window();
// Where the object of the name behind the key is in it.
u32 static_shared(const unsigned char* window, const void* key, size_t bytes, size_t align);

SEQKERN_INLINE unsigned char* in_shared(unsigned char* window, u64 address, s64 offset) {
  return window + static_cast<u32>(address + static_cast<u64>(offset));
}
SEQKERN_INLINE unsigned char* pointer(u64 address, s64 offset) {
  return reinterpret_cast<unsigned char*>(address + static_cast<u64>(offset));
}
SEQKERN_INLINE u64 cvta_from_shared(const unsigned char* window, u64 address) {
  return reinterpret_cast<u64>(window) + static_cast<u32>(address);
}
SEQKERN_INLINE u64 cvta_to_shared(const unsigned char* window, u64 address) {
  return address - reinterpret_cast<u64>(window);
}
SEQKERN_INLINE u64 cvta_from_local(const unsigned char*, u64 address) { return address; }
SEQKERN_INLINE u64 cvta_to_global(const unsigned char*, u64 address) { return address; }
SEQKERN_INLINE u64 cvta_from_global(const unsigned char*, u64 address) { return address; }

template <class T, size_t kCount>
struct Loaded {
  T x[kCount];
  SEQKERN_INLINE T operator[](size_t i) const { return x[i]; }
};
template <class T, size_t kCount>
SEQKERN_INLINE Loaded<T, kCount> load(const unsigned char* p) {
  Loaded<T, kCount> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <class T, class... Values>
SEQKERN_INLINE void store(unsigned char* p, Values... values) {
  const T x[] = {values...};
  __builtin_memcpy(p, x, sizeof(x));
}

SEQKERN_INLINE void parameter_read(const void*, size_t) {}
void weak_read(void* p, size_t bytes);
void weak_write(void* p, size_t bytes);
// Each lets other threads run first: a thread may wait for what it reads so.
void relaxed_read(void* p, size_t bytes);
void acquire_read(void* p, size_t bytes);
SEQKERN_INLINE void volatile_read(void* p, size_t bytes) { relaxed_read(p, bytes); }
void relaxed_write(void* p, size_t bytes);
void release_write(void* p, size_t bytes);
SEQKERN_INLINE void volatile_write(void* p, size_t bytes) { relaxed_write(p, bytes); }

enum class Order { k_relaxed, k_acquire, k_release, k_acq_rel };
void before_atomic(void* p, size_t bytes, Order order);
void after_atomic(Order order);
template <class T, class F>
SEQKERN_INLINE T atomic(unsigned char* p, Order order, F f) {
  before_atomic(p, sizeof(T), order);
  const T old = load<T, 1>(p)[0];
  store<T>(p, f(old));
  after_atomic(order);
  return old;
}
template <class T>
SEQKERN_INLINE T atom_add(unsigned char* p, Order order, T x) {
  return atomic<T>(p, order, [x](T old) { return static_cast<T>(old + x); });
}
template <class T>
SEQKERN_INLINE T atom_exch(unsigned char* p, Order order, T x) {
  return atomic<T>(p, order, [x](T) { return x; });
}
template <class T>
SEQKERN_INLINE T atom_max(unsigned char* p, Order order, T x) {
  return atomic<T>(p, order, [x](T old) { return old > x ? old : x; });
}
template <class T>
SEQKERN_INLINE T atom_min(unsigned char* p, Order order, T x) {
  return atomic<T>(p, order, [x](T old) { return old < x ? old : x; });
}
template <class T>
SEQKERN_INLINE T atom_or(unsigned char* p, Order order, T x) {
  return atomic<T>(p, order, [x](T old) { return static_cast<T>(old | x); });
}
template <class T>
SEQKERN_INLINE T atom_cas(unsigned char* p, Order order, T compare, T x) {
  return atomic<T>(p, order, [=](T old) { return old == compare ? x : old; });
}

SEQKERN_INLINE void prefetch(const void*) {}
void cp_async(unsigned char* shared, const unsigned char* global, int bytes, int valid);

// ---------------------------------------------------------------- waiting

void bar_sync(u64 barrier);
void bar_sync(u64 barrier, u64 threads);
void bar_warp_sync(u64 mask);
void membar_gl();
[[noreturn]] void trap();
SEQKERN_INLINE void membar_cta() {}

// ---------------------------------------------------------------- warps

u32 shuffle(const char* mode, bool& inside, u32 x, u32 b, u32 c, u32 mask);
#define SEQKERN_SHUFFLE(mode)                                                    \
  template <class Inside>                                                        \
  SEQKERN_INLINE u32 shfl_##mode(Inside& found, u32 x, u32 b, u32 c, u32 mask) { \
    bool inside;                                                                 \
    const u32 y = shuffle(#mode, inside, x, b, c, mask);                         \
    put(found, inside);                                                          \
    return y;                                                                    \
  }
SEQKERN_SHUFFLE(up)
SEQKERN_SHUFFLE(down)
SEQKERN_SHUFFLE(bfly)
SEQKERN_SHUFFLE(idx)
#undef SEQKERN_SHUFFLE

u32 reduce(u32 x, u32 mask, u32 (*merge)(u32, u32));
u32 ballot(bool predicate, u32 mask);
SEQKERN_INLINE u32 vote_ballot(bool predicate, u32 mask) { return ballot(predicate, mask); }
SEQKERN_INLINE bool vote_any(bool predicate, u32 mask) { return ballot(predicate, mask) != 0; }
SEQKERN_INLINE bool vote_all(bool predicate, u32 mask) { return ballot(predicate, mask) == mask; }

template <class T, class Merge>
SEQKERN_INLINE T redux(T x, u32 mask, Merge merge) {
  static_assert(sizeof(T) == 4);
  return as<T>(reduce(static_cast<u32>(x), mask, [](u32 a, u32 b) -> u32 {
    return static_cast<u32>(Merge{}(static_cast<T>(a), static_cast<T>(b)));
  }));
}
template <class T>
SEQKERN_INLINE T redux_max(T x, u32 mask) {
  return redux(x, mask, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
SEQKERN_INLINE T redux_min(T x, u32 mask) {
  return redux(x, mask, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
SEQKERN_INLINE T redux_add(T x, u32 mask) {
  return redux(x, mask, [](T a, T b) { return static_cast<T>(a + b); });
}

// `at` names the instruction: all lanes must come to the same one.
struct Tile {
  u32 x[4];
  SEQKERN_INLINE u32 operator[](size_t i) const { return x[i]; }
};
struct Operands {
  u32 a[4], b[2], c[4];
};
Tile multiply(int at, const Operands& operands, bool bfloat);
template <class T>
SEQKERN_INLINE Tile mma_m16n8k16(int at, const u32 (&a)[4], const u32 (&b)[2], const u32 (&c)[4]) {
  return multiply(at, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}},
                  std::is_same_v<T, bf16>);
}
Tile load_matrices(int at, const unsigned char* row, bool transpose, int count);
template <bool kTranspose, int kMatrices>
SEQKERN_INLINE Tile ldmatrix(int at, const unsigned char* row) {
  return load_matrices(at, row, kTranspose, kMatrices);
}

// ---------------------------------------------------------------- kernels

using Kernel = void (*)(const void* const* parameters);
struct Registered {
  // counters: how often threads ran each of the kernel's `blocks` pieces without a branch.
  Registered(const char* name, Kernel kernel, u64* counters, size_t blocks);
};

}  // namespace seqkern::emulator::ptx
