// Whether this process may use the instruction set that a test program is for.
#pragma once

#include "cpu/isa.h"

namespace seqkern::cpu {

inline bool has_unit() {
#if defined(SEQKERN_HAS_AMX)
  return supported(Isa::kAmx);  // the question asks the system for the unit
#else
  return true;
#endif
}

}  // namespace seqkern::cpu
