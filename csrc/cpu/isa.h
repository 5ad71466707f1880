// The instruction set the CPU kernels run on, chosen once per process.
#pragma once

#include <string>

namespace seqkern::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best one the processor has, or the one SEQKERN_FORCE_ISA names ("baseline", "avx2", "avx512",
// "avx512_bf16": with products of bf16, "amx": with a matrix unit for them). Throws
// std::invalid_argument if that name is unknown or the processor lacks it.
Isa active_isa();
inline constexpr Isa kFastestFirst[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2,
                                        Isa::kBaseline};
bool supported(Isa isa);  // by this processor
const char* isa_name(Isa isa);

}  // namespace seqkern::cpu
