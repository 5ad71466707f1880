// The instruction set the CPU kernels run on, chosen once per process.
#pragma once

#include <string>

namespace seqkern::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512, kAmx };

// The best one the processor has, or the one SEQKERN_FORCE_ISA names ("baseline", "avx2", "avx512",
// "amx": AVX-512 with a matrix unit). Throws std::invalid_argument if that name is unknown or the
// processor lacks it.
Isa active_isa();
inline constexpr Isa kFastestFirst[] = {Isa::kAmx, Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};
bool supported(Isa isa);  // by this processor
const char* isa_name(Isa isa);

}  // namespace seqkern::cpu
