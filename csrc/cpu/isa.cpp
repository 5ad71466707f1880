#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace seqkern::cpu {

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             supported(Isa::kAvx2);
    case Isa::kAvx2:
      // Every processor with AVX2 has F16C, but a hypervisor may hide it.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

namespace {

Isa choose() {
  const char* forced = std::getenv("SEQKERN_FORCE_ISA");
  for (const Isa isa : kFastestFirst) {
    if (forced && *forced) {
      if (std::string(forced) != isa_name(isa)) continue;
      if (supported(isa)) return isa;
      throw std::invalid_argument("SEQKERN_FORCE_ISA=" + std::string(forced) +
                                  ": this processor does not have it");
    }
    if (supported(isa)) return isa;
  }
  throw std::invalid_argument("SEQKERN_FORCE_ISA must be baseline, avx2 or avx512, got '" +
                              std::string(forced) + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
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
