// Routes each kernel to the build of the active instruction set.
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace seqkern::cpu {

// Kernels to which the matrix unit makes a difference have a build for it, the others have none.
#if defined(SEQKERN_HAS_AMX)
#define SEQKERN_ROUTE_MATRIX(call) \
  if (active_isa() == Isa::kAmx) return amx::call;
#else
#define SEQKERN_ROUTE_MATRIX(call)
#endif
#if defined(__x86_64__)
#define SEQKERN_ROUTE(call)  \
  switch (active_isa()) {    \
    case Isa::kAmx:          \
    case Isa::kAvx512:       \
      return avx512::call;   \
    case Isa::kAvx2:         \
      return avx2::call;     \
    default:                 \
      return baseline::call; \
  }
#else
#define SEQKERN_ROUTE(call) return baseline::call;
#endif
#define SEQKERN_DISPATCH(name, Args) \
  void name(const Args& args, int64_t begin, int64_t end) { SEQKERN_ROUTE(name(args, begin, end)) }
#define SEQKERN_DISPATCH_MATRIX(name, Args)                 \
  void name(const Args& args, int64_t begin, int64_t end) { \
    SEQKERN_ROUTE_MATRIX(name(args, begin, end))            \
    SEQKERN_ROUTE(name(args, begin, end))                   \
  }
#define SEQKERN_DISPATCH_TEAM(name, Args)                                                        \
  int64_t name##_workspace(const Args& args, int64_t members) {                                  \
    SEQKERN_ROUTE_MATRIX(name##_workspace(args, members))                                        \
    SEQKERN_ROUTE(name##_workspace(args, members))                                               \
  }                                                                                              \
  void name##_prepare(const Args& args, int64_t members) {                                       \
    SEQKERN_ROUTE_MATRIX(name##_prepare(args, members))                                          \
    SEQKERN_ROUTE(name##_prepare(args, members))                                                 \
  }                                                                                              \
  void name(const Args& args, int64_t members, int64_t member) {                                 \
    SEQKERN_ROUTE_MATRIX(name(args, members, member)) SEQKERN_ROUTE(name(args, members, member)) \
  }

SEQKERN_CPU_KERNELS(SEQKERN_DISPATCH)
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DISPATCH_MATRIX)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DISPATCH_TEAM)

}  // namespace seqkern::cpu
