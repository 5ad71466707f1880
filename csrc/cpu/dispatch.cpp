// Routes each kernel to the build of the active instruction set.
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace seqkern::cpu {

#if defined(__x86_64__)
#define SEQKERN_DISPATCH(name, Args)                        \
  void name(const Args& args, int64_t begin, int64_t end) { \
    switch (active_isa()) {                                 \
      case Isa::kAvx512:                                    \
        return avx512::name(args, begin, end);              \
      case Isa::kAvx2:                                      \
        return avx2::name(args, begin, end);                \
      default:                                              \
        return baseline::name(args, begin, end);            \
    }                                                       \
  }
#else
#define SEQKERN_DISPATCH(name, Args)                        \
  void name(const Args& args, int64_t begin, int64_t end) { \
    return baseline::name(args, begin, end);                \
  }
#endif

SEQKERN_CPU_KERNELS(SEQKERN_DISPATCH)

}  // namespace seqkern::cpu
