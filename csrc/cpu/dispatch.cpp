// Routes each kernel to the build of the active instruction set.
#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/mixed_product.h"

namespace seqkern::cpu {

// The matrix unit makes a difference to the kernels of teams; the others have no build for it.
#if defined(SEQKERN_HAS_AMX)
#define SEQKERN_ROUTE_TEAM(call) \
  if (active_isa() == Isa::kAmx) return amx::call;
#else
#define SEQKERN_ROUTE_TEAM(call)
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
#define SEQKERN_DISPATCH_TEAM(name, Args)                                                          \
  int64_t name##_workspace(const Args& args, int64_t members) {                                    \
    SEQKERN_ROUTE_TEAM(name##_workspace(args, members))                                            \
    SEQKERN_ROUTE(name##_workspace(args, members))                                                 \
  }                                                                                                \
  void name##_prepare(const Args& args, int64_t members) {                                         \
    SEQKERN_ROUTE_TEAM(name##_prepare(args, members)) SEQKERN_ROUTE(name##_prepare(args, members)) \
  }                                                                                                \
  void name(const Args& args, int64_t members, int64_t member) {                                   \
    SEQKERN_ROUTE_TEAM(name(args, members, member)) SEQKERN_ROUTE(name(args, members, member))     \
  }

SEQKERN_CPU_KERNELS(SEQKERN_DISPATCH)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DISPATCH_TEAM)

bool has_mixed_product() { return active_isa() == Isa::kAmx; }
#define SEQKERN_DISPATCH_MIXED(call) \
  SEQKERN_ROUTE_TEAM(call)           \
  throw std::logic_error("mixed_product: no matrix unit in use");
int64_t mixed_product_workspace([[maybe_unused]] const MixedProductArgs& args,
                                [[maybe_unused]] int64_t members) {
  SEQKERN_DISPATCH_MIXED(mixed_product_workspace(args, members))
}
void mixed_product_prepare([[maybe_unused]] const MixedProductArgs& args,
                           [[maybe_unused]] int64_t members) {
  SEQKERN_DISPATCH_MIXED(mixed_product_prepare(args, members))
}
void mixed_product([[maybe_unused]] const MixedProductArgs& args, [[maybe_unused]] int64_t members,
                   [[maybe_unused]] int64_t member) {
  SEQKERN_DISPATCH_MIXED(mixed_product(args, members, member))
}

}  // namespace seqkern::cpu
