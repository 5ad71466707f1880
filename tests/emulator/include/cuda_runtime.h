// Stands in for CUDA's header when g++ compiles csrc/cuda for the emulator: the part that seqkern
// uses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "common/dtype.h"
#include "emulator.h"

// ---------------------------------------------------------------- qualifiers

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---------------------------------------------------------------- vector types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define SEQKERN_VECTOR_TYPES(T, name)                                           \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SEQKERN_VECTOR_TYPES(float, float)
SEQKERN_VECTOR_TYPES(double, double)
SEQKERN_VECTOR_TYPES(int, int)
SEQKERN_VECTOR_TYPES(unsigned, uint)
#undef SEQKERN_VECTOR_TYPES

// ---------------------------------------------------------------- host API

typedef enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
} cudaError_t;
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

typedef struct CUstream_st* cudaStream_t;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// One device, as set_device says (emulator.h); its compute capability can be set (emulator.cpp).
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace seqkern::emulator {
struct Call {
  const void* data;
  size_t bytes;
};
// A kernel as nvcc compiled it (tests/ptx), which takes where its parameters are, and how to find
// that of a kernel here; null where kernels run as g++ compiled them.
using CompiledKernel = void (*)(const void* const* parameters);
extern CompiledKernel (*compiled_kernel)(const void* kernel);

// Runs `thread`, which makes the call, once per thread of the grid.
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel,
                     const std::function<void()>& thread, Call call);
}  // namespace seqkern::emulator

// The kernel has run when this returns.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  namespace emulator = seqkern::emulator;
  const auto* address = reinterpret_cast<const void*>(kernel);
  struct {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> parameters;
    emulator::CompiledKernel compiled;
    const void* addresses[sizeof...(Params)];
  } call = {kernel, std::tuple<std::decay_t<Params>...>(args...), nullptr, {}};
  if (emulator::compiled_kernel) call.compiled = emulator::compiled_kernel(address);
  size_t i = 0;
  std::apply([&](const auto&... p) { ((call.addresses[i++] = &p), ...); }, call.parameters);
  return emulator::run_grid(*config, address,
                            [&call] {
                              if (call.compiled) {
                                call.compiled(call.addresses);
                              } else {
                                std::apply(call.kernel, call.parameters);
                              }
                            },
                            {&call, sizeof(call)});
}

// ---------------------------------------------------------------- where a thread is

// Of the running fiber; set at each switch.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

// ---------------------------------------------------------------- synchronisation

inline void __syncthreads(
    seqkern::emulator::Location where = seqkern::emulator::Location::current()) {
  seqkern::emulator::block_barrier("__syncthreads", where);
}
#define SEQKERN_SYNCTHREADS(name, count)                                                        \
  inline int name(int predicate,                                                                \
                  seqkern::emulator::Location where = seqkern::emulator::Location::current()) { \
    return seqkern::emulator::block_barrier(#name, where, count, predicate != 0);               \
  }
SEQKERN_SYNCTHREADS(__syncthreads_and, seqkern::emulator::Count::kAnd)
SEQKERN_SYNCTHREADS(__syncthreads_or, seqkern::emulator::Count::kOr)
SEQKERN_SYNCTHREADS(__syncthreads_count, seqkern::emulator::Count::kSum)
#undef SEQKERN_SYNCTHREADS

inline void __threadfence() { seqkern::emulator::thread_fence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { seqkern::emulator::yield(); }

// ---------------------------------------------------------------- warps

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       seqkern::emulator::Location where = seqkern::emulator::Location::current()) {
  seqkern::emulator::warp_collective("__syncwarp", 0, [](const auto&, int) {}, mask, where);
  seqkern::emulator::synchronise_lanes(mask);
}

#define SEQKERN_SHUFFLE(name, Operand, source)                                         \
  template <class X>                                                                   \
  X name(unsigned mask, X x, Operand operand, int width = 32,                          \
         seqkern::emulator::Location where = seqkern::emulator::Location::current()) { \
    return seqkern::emulator::warp_collective(                                         \
        #name, x,                                                                      \
        [&](const seqkern::emulator::Lanes<X>& lanes, int lane) {                      \
          const int first = lane / width * width;                                      \
          const int from = source;                                                     \
          const bool inside = from >= first && from < first + width;                   \
          if (inside && !(mask >> from & 1))                                           \
            seqkern::emulator::fail(#name " reads a lane outside its mask");           \
          return inside ? lanes[from] : lanes[lane];                                   \
        },                                                                             \
        mask, where);                                                                  \
  }
SEQKERN_SHUFFLE(__shfl_sync, int, first + (operand % width + width) % width)
SEQKERN_SHUFFLE(__shfl_xor_sync, int, (lane ^ operand))
SEQKERN_SHUFFLE(__shfl_down_sync, unsigned, lane + static_cast<int>(operand))
SEQKERN_SHUFFLE(__shfl_up_sync, unsigned, lane - static_cast<int>(operand))
#undef SEQKERN_SHUFFLE

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    seqkern::emulator::Location where = seqkern::emulator::Location::current()) {
  return seqkern::emulator::warp_collective(
      "__ballot_sync", predicate,
      [&](const seqkern::emulator::Lanes<int>& lanes, int) {
        unsigned bits = 0;
        for (int l = 0; l < 32; ++l) bits |= unsigned{(mask >> l & 1) && lanes[l] != 0} << l;
        return bits;
      },
      mask, where);
}
inline int __any_sync(unsigned mask, int predicate,
                      seqkern::emulator::Location where = seqkern::emulator::Location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      seqkern::emulator::Location where = seqkern::emulator::Location::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}

#define SEQKERN_WARP_REDUCE(name, X, expression)                                              \
  inline X name(unsigned mask, X x,                                                           \
                seqkern::emulator::Location where = seqkern::emulator::Location::current()) { \
    return seqkern::emulator::warp_collective(                                                \
        #name, x,                                                                             \
        [&](const seqkern::emulator::Lanes<X>& lanes, int lane) {                             \
          X a = lanes[lane];                                                                  \
          for (int l = 0; l < 32; ++l) {                                                      \
            if (l == lane || !(mask >> l & 1)) continue;                                      \
            const X b = lanes[l];                                                             \
            a = expression;                                                                   \
          }                                                                                   \
          return a;                                                                           \
        },                                                                                    \
        mask, where);                                                                         \
  }
SEQKERN_WARP_REDUCE(__reduce_add_sync, int, a + b)
SEQKERN_WARP_REDUCE(__reduce_add_sync, unsigned, a + b)
SEQKERN_WARP_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SEQKERN_WARP_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SEQKERN_WARP_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SEQKERN_WARP_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SEQKERN_WARP_REDUCE(__reduce_or_sync, unsigned, a | b)
SEQKERN_WARP_REDUCE(__reduce_and_sync, unsigned, a& b)
#undef SEQKERN_WARP_REDUCE

// ---------------------------------------------------------------- atomics

template <class X>
X atomicAdd(X* p, X x) {
  return seqkern::emulator::atomic_update(p, [=](X old) { return static_cast<X>(old + x); });
}
template <class X>
X atomicMax(X* p, X x) {
  return seqkern::emulator::atomic_update(p, [=](X old) { return old > x ? old : x; });
}
template <class X>
X atomicMin(X* p, X x) {
  return seqkern::emulator::atomic_update(p, [=](X old) { return old < x ? old : x; });
}
template <class X>
X atomicOr(X* p, X x) {
  return seqkern::emulator::atomic_update(p, [=](X old) { return old | x; });
}
template <class X>
X atomicExch(X* p, X x) {
  return seqkern::emulator::atomic_update(p, [=](X) { return x; });
}
template <class X>
X atomicCAS(X* p, X compare, X x) {
  return seqkern::emulator::atomic_update(p, [=](X old) { return old == compare ? x : old; });
}

// ---------------------------------------------------------------- loads, bits, arithmetic

template <class X>
X __ldg(const X* p) {
  return *p;
}

namespace seqkern::emulator {
template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}
}  // namespace seqkern::emulator

inline float __uint_as_float(unsigned x) { return seqkern::emulator::bits_of<float>(x); }
inline float __int_as_float(int x) { return seqkern::emulator::bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return seqkern::emulator::bits_of<unsigned>(x); }
inline int __float_as_int(float x) { return seqkern::emulator::bits_of<int>(x); }
inline int __double2hiint(double x) {
  return static_cast<int>(seqkern::emulator::bits_of<uint64_t>(x) >> 32);
}
inline int __double2loint(double x) {
  return static_cast<int>(seqkern::emulator::bits_of<uint64_t>(x));
}
inline double __hiloint2double(int high, int low) {
  return seqkern::emulator::bits_of<double>(
      static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

using std::max;
using std::min;
