// Marks what both host and device code may call; nothing for a host compiler.
#pragma once

#if defined(__CUDACC__)
#define SEQKERN_HD __host__ __device__
#else
#define SEQKERN_HD
#endif

// For what files of one instruction set (csrc/cpu) also include: never a function of its own, which
// the linker might keep for processors without it.
#define SEQKERN_HD_INLINE SEQKERN_HD __attribute__((always_inline)) inline

// Before a loop over a few constants. nvcc's pass over the host's side knows neither spelling.
#if defined(__CUDA_ARCH__)
#define SEQKERN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define SEQKERN_UNROLL
#else
#define SEQKERN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace seqkern {

template <class I>
SEQKERN_HD constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace seqkern
