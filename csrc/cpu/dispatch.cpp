// Routes each kernel to the build of the active instruction set.
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace seqkern::cpu {

namespace {

template <class Args>
DType dtype_of(const Args& args) {
  if constexpr (requires { args.dtype; }) {
    return args.dtype;
  } else if constexpr (requires { args.r; }) {
    return args.r.dtype;
  } else if constexpr (requires { args.in.r; }) {
    return args.in.r.dtype;
  } else if constexpr (requires { args.step; }) {
    return dtype_of(args.step);
  } else {
    return args.in.dtype;
  }
}

// Whether a kernel that has a build for `isa` is taken from there: for other dtypes it would be
// that of AVX-512, and is not made.
template <class Args>
bool takes(Isa isa, const Args& args) {
  const DType dtype = dtype_of(args);
  return active_isa() == isa &&
         (dtype == DType::kBFloat16 || (dtype == DType::kFloat16 && isa == Isa::kAmx));
}

}  // namespace

#if defined(SEQKERN_HAS_AMX)
#define SEQKERN_ROUTE_AMX(call) \
  if (takes(Isa::kAmx, args)) return amx::call;
#define SEQKERN_DISPATCH_UNIT(name, Args) \
  void name(const Args& args, int64_t begin, int64_t end) { amx::name(args, begin, end); }
#else
#define SEQKERN_ROUTE_AMX(call)
#define SEQKERN_DISPATCH_UNIT(name, Args) \
  void name(const Args&, int64_t, int64_t) {}
#endif
#if defined(__x86_64__)
#define SEQKERN_ROUTE_16_BIT(call) \
  SEQKERN_ROUTE_AMX(call)          \
  if (takes(Isa::kAvx512Bf16, args)) return avx512_bf16::call;
#else
#define SEQKERN_ROUTE_16_BIT(call)
#endif
#if defined(__x86_64__)
#define SEQKERN_ROUTE(call)  \
  switch (active_isa()) {    \
    case Isa::kAmx:          \
    case Isa::kAvx512Bf16:   \
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
    SEQKERN_ROUTE_16_BIT(name(args, begin, end))            \
    SEQKERN_ROUTE(name(args, begin, end))                   \
  }
#define SEQKERN_DISPATCH_TEAM(name, Args)                                                        \
  int64_t name##_workspace(const Args& args, int64_t members) {                                  \
    SEQKERN_ROUTE_16_BIT(name##_workspace(args, members))                                        \
    SEQKERN_ROUTE(name##_workspace(args, members))                                               \
  }                                                                                              \
  void name##_prepare(const Args& args, int64_t members) {                                       \
    SEQKERN_ROUTE_16_BIT(name##_prepare(args, members))                                          \
    SEQKERN_ROUTE(name##_prepare(args, members))                                                 \
  }                                                                                              \
  void name(const Args& args, int64_t members, int64_t member) {                                 \
    SEQKERN_ROUTE_16_BIT(name(args, members, member)) SEQKERN_ROUTE(name(args, members, member)) \
  }

SEQKERN_CPU_KERNELS(SEQKERN_DISPATCH)
SEQKERN_CPU_MATRIX_KERNELS(SEQKERN_DISPATCH_MATRIX)
SEQKERN_CPU_UNIT_KERNELS(SEQKERN_DISPATCH_UNIT)
SEQKERN_CPU_TEAM_KERNELS(SEQKERN_DISPATCH_TEAM)

bool multiplies_bf16() { return active_isa() == Isa::kAmx || active_isa() == Isa::kAvx512Bf16; }

bool multiplies_floats() {
#if defined(__x86_64__)
  return active_isa() != Isa::kBaseline && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace seqkern::cpu
