// Instructions C++ has no name for: the only inline assembly. Beside each stands its meaning in
// C++, which the host emulator runs. Reference: the PTX ISA, sections on mma, ldmatrix, cp.async,
// ex2, rcp, max and the memory consistency model.
//
// mma m16n8k16 needs sm_80. For older GPUs it compiles to a trap: attention.cu, attention_step.cu
// and resident.h do not choose the kernels that use it there. cp.async becomes a copy that is over
// when it returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cuda {

// ---------------------------------------------------------------- ex2, rcp

// 2^x with a relative error of about 2^-22; subnormal operands and results are flushed to 0.
__device__ __forceinline__ float ex2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // NaN is not below
#endif
}

// 1 / x with a relative error of 2^-23; subnormal operands and results are flushed to 0. A division
// is exact to half a bit, and branches for what an approximation cannot.
__device__ __forceinline__ float rcp_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = 1 / x;
  return std::fabs(y) < 1.17549435e-38f ? 0.0f : y;  // NaN is not below
#endif
}

// ---------------------------------------------------------------- max

// The larger one, or NaN where one of them is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return a > b || a != a ? a : b;
#elif defined(__CUDACC__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || b != b ? __uint_as_float(0x7fffffffu) : ::fmaxf(a, b);
#endif
}

// ---------------------------------------------------------------- registers

// x (32 or 64 bits), of which the compiler does not see that it is the same as before: in a loop,
// what follows from it is computed where it is used, instead of being kept in registers through
// loops around; of what is made opaque before a loop, the loop does not compute anything again.
template <class X>
__device__ __forceinline__ X opaque(X x) {
  static_assert(sizeof(X) == 4 || sizeof(X) == 8);
#if defined(__CUDACC__)
  if constexpr (sizeof(X) == 4) {
    asm volatile("" : "+r"(x));
  } else {
    asm volatile("" : "+l"(x));
  }
#endif
  return x;
}

// ---------------------------------------------------------------- mma.sync

// D = A B + C over a warp: A [16, 16] row-major, B [16, 8] column-major, C and D [16, 8] float.
// With g = lane / 4 and t = lane % 4, each register holding two neighbours of the k dimension:
//   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (a[2], a[3]: + 8)
//   b[0..1]: rows 2t, 2t + 1 (b[1]: + 8); column g
//   c[0..3], d[0..3]: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
// Products are exact in float; the emulator adds them and c in double and rounds once, where the
// tensor core aligns and truncates: results may differ in the last bit. Volatile, as all lanes have
// to take part: without, the compiler may move it to where its result is used, by some of them.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], const float (&c)[4]) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#elif defined(__CUDACC__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
#else
  struct Operands {
    uint32_t a[4];
    uint32_t b[2];
  };
  float result[4];
  emulator::warp_collective("mma.sync", Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
                            [&](const emulator::Lanes<Operands>& lanes, int lane) {
                              for (int i = 0; i < 4; ++i) {
                                const int row = lane / 4 + (i / 2) * 8;
                                const int column = 2 * (lane % 4) + i % 2;
                                double sum = c[i];
                                for (int k = 0; k < 16; ++k) {
                                  const int pair = (k % 8) / 2;
                                  const uint32_t a_bits =
                                      lanes[(row % 8) * 4 + pair].a[row / 8 + 2 * (k / 8)];
                                  const uint32_t b_bits = lanes[column * 4 + pair].b[k / 8];
                                  sum += double(emulator::half_of<T>(a_bits, k % 2)) *
                                         emulator::half_of<T>(b_bits, k % 2);
                                }
                                result[i] = static_cast<float>(sum);
                              }
                            });
  for (int i = 0; i < 4; ++i) d[i] = result[i];
#endif
}

// ---------------------------------------------------------------- ldmatrix

// Loads kMatrices 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 j + r passes the
// 16-byte aligned address of row r of matrix j (lanes from 8 kMatrices on: any valid one). out[j]
// holds matrix j's row lane / 4, columns 2 (lane % 4) and the next; with kTranspose, of the
// transposed matrix.
template <bool kTranspose, int kMatrices>
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  // "memory": shared memory written before the call must be in place.
  if constexpr (kMatrices == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulator::require_shared(row, 16, "ldmatrix");
  emulator::warp_collective(
      "ldmatrix", row, [&](const emulator::Lanes<const void*>& rows, int lane) {
        for (int j = 0; j < kMatrices; ++j) {
          uint32_t bits = 0;
          for (int i = 0; i < 2; ++i) {
            const int r = kTranspose ? 2 * (lane % 4) + i : lane / 4;
            const int column = kTranspose ? lane / 4 : 2 * (lane % 4) + i;
            const auto* element = static_cast<const uint16_t*>(rows[8 * j + r]) + column;
            bits |= static_cast<uint32_t>(emulator::load_shared(element)) << (16 * i);
          }
          out[j] = bits;
        }
      });
#endif
}

// ---------------------------------------------------------------- 16 bytes to shared memory

// *p = x in one access: of an assignment nvcc makes four at times, which meet in the banks.
__device__ __forceinline__ void store_shared16(void* p, const uint4& x) {
#if defined(__CUDACC__)
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(p) = x;
#endif
}

// ---------------------------------------------------------------- between blocks

// *flag = x, after every write and read of memory that this thread did before, or that a barrier
// ordered before it (release), as seen by all threads of the device.
__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t x) {
#if defined(__CUDACC__)
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(flag), "r"(x) : "memory");
#else
  emulator::store_release(flag, x);
#endif
}

// *flag; where that is what a store_release wrote, everything ordered before the store is seen by
// this thread's later accesses, and by those of threads that a barrier orders after it (acquire).
__device__ __forceinline__ uint32_t load_acquire(uint32_t* flag) {
#if defined(__CUDACC__)
  uint32_t x;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x;
#else
  return emulator::load_acquire(flag);
#endif
}

// Accesses of what others write and read meanwhile. They read and write L2, of which each place has
// one value at a time; other places may be seen in any order. Of the 16 bytes every part that is
// stored by itself is read by itself.
__device__ __forceinline__ void store_relaxed(uint16_t* p, uint16_t x) {
#if defined(__CUDACC__)
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(x) : "memory");
#else
  emulator::store_relaxed(p, x);
#endif
}
__device__ __forceinline__ uint4 load_relaxed(const void* p) {
#if defined(__CUDACC__)
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
#else
  return emulator::load_relaxed(static_cast<const uint4*>(p));
#endif
}

// Between two polls of a flag or a value, the n-th and the next. A GPU polls on at once, but not
// for ever: after some 20 seconds what it waits for has failed, and the kernel ends with an error.
__device__ __forceinline__ void between_polls([[maybe_unused]] uint32_t n) {
#if defined(__CUDACC__)
  if (n >= 1u << 26) __trap();
#else
  __nanosleep(20);  // runs other threads
#endif
}

// ---------------------------------------------------------------- prefetch

// Asks for the line of p, which must be readable, to be brought to second-level cache.
__device__ __forceinline__ void prefetch_l2([[maybe_unused]] const void* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// ---------------------------------------------------------------- cp.async

// Whether something orders all writes of what is copied before the copy or after its end, or others
// store parts of it meanwhile, by store_relaxed. PTX has no copy for that, but one of 16 bytes
// reads L2, as load_relaxed does: each part as it was before or after a store.
enum class Copied { kOrdered, kMeanwhile };

// Copies kBytes (4, 8 or 16) from global to shared memory in the background; past `valid` bytes the
// destination is filled with zeros (valid = 0 reads nothing). 16 bytes bypass L1.
template <int kBytes, Copied kCopied = Copied::kOrdered>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  static_assert(kCopied == Copied::kOrdered || kBytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int i = 0; i < kBytes / 2; ++i) {
    static_cast<uint16_t*>(shared)[i] =
        2 * i < valid ? static_cast<const uint16_t*>(global)[i] : uint16_t{0};
  }
#elif defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
#else
  emulator::cp_async(
      shared, global, kBytes, valid,
      kCopied == Copied::kOrdered ? emulator::Kind::kRead : emulator::Kind::kRelaxedRead);
#endif
}

// Closes the group of copies this thread has started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  // nothing is in flight
#elif defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits until at most kPending of this thread's groups are in flight. Other threads see the data
// after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  // nothing is in flight
#elif defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::cp_async_wait(kPending);
#endif
}

}  // namespace seqkern::cuda
