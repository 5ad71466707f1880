// Marks what both host and device code may call; nothing for a host compiler.
#pragma once

#if defined(__CUDACC__)
#define SEQKERN_HD __host__ __device__
#else
#define SEQKERN_HD
#endif

namespace seqkern {

template <class I>
SEQKERN_HD constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace seqkern
