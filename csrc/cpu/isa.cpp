#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(SEQKERN_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqkern::cpu {
namespace {

#if defined(__x86_64__)
struct CpuId {
  unsigned a = 0, b = 0, c = 0, d = 0;

  CpuId(unsigned leaf, unsigned page) { __get_cpuid_count(leaf, page, &a, &b, &c, &d); }
};

// Of these two __builtin_cpu_supports knows the names with some compilers only.
bool has_half_conversions() { return (CpuId(1, 0).c & 1u << 29) != 0; }
bool has_bf16_instructions() { return (CpuId(7, 1).a & 1u << 5) != 0; }

// A matrix unit for bf16, which Linux lends to processes that ask: its registers are 8 KB more for
// each thread to save.
bool has_matrix_unit() {
#if defined(SEQKERN_HAS_AMX)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if ((~CpuId(7, 0).d & (kBf16 | kTiles)) != 0) return false;
  constexpr long kAskForState = 0x1023, kTileState = 18;  // arch_prctl(2)
  return ::syscall(SYS_arch_prctl, kAskForState, kTileState) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAmx:
      return supported(Isa::kAvx512Bf16) && has_matrix_unit();
    case Isa::kAvx512Bf16:
      return supported(Isa::kAvx512) && has_bf16_instructions();
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             supported(Isa::kAvx2);
    case Isa::kAvx2:
      // Every processor with AVX2 has F16C, but a hypervisor may hide it.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             has_half_conversions();
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

namespace {

// Whether the instruction set is what to take where nothing is asked for. An Intel Xeon multiplied
// bf16 in its vector units at half the rate of float; an AMD Zen 4 does at twice that rate.
bool worth_having(Isa isa) {
#if defined(__x86_64__)
  return isa != Isa::kAvx512Bf16 || __builtin_cpu_is("amd");
#else
  (void)isa;
  return true;
#endif
}

Isa choose() {
  const char* forced = std::getenv("SEQKERN_FORCE_ISA");
  for (const Isa isa : kFastestFirst) {
    if (forced && *forced) {
      if (std::string(forced) != isa_name(isa)) continue;
      if (supported(isa)) return isa;
      throw std::invalid_argument("SEQKERN_FORCE_ISA=" + std::string(forced) +
                                  ": this processor does not have it");
    }
    if (supported(isa) && worth_having(isa)) return isa;
  }
  throw std::invalid_argument(
      "SEQKERN_FORCE_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got '" +
      std::string(forced) + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace seqkern::cpu
