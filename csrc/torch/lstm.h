// What the LSTM's sequence and its single step share in the torch layer.
#pragma once

#include "torch/recurrent.h"

namespace seqkern {

inline void* mutable_data(const Tensor& t, bool wanted = true) {
  return wanted ? t.mutable_data_ptr() : nullptr;
}

// Which gradients a backward op is asked for; python/seqkern/ops/_recurrent.py has the same
// numbers.
enum Needs : int64_t {
  kInput = 1,
  kH0 = 2,
  kC0 = 4,
  kWih = 8,
  kWhh = 16,
  kBias = 32,
  kWhr = 64,
};

#if defined(SEQKERN_BACKEND_CPU)
// A copy of both weights of a step in the layout of its kernel, which the caller keeps: a uint8
// tensor of this and the copy.
struct alignas(64) PackedWeights {
  int64_t isa;  // whose layout it is
  int64_t dtype;
  int64_t I, H;
  int64_t members;
};

// One step with its products: weights read where they are, packed on the way, or found packed.
inline void run_step(const Tensor& like, const cpu::LstmStepForwardArgs& step,
                     const PackedWeights* kept = nullptr) {
  const int64_t rows = kept ? Backend::step_kept_rows(step.in) : Backend::step_pack_rows(step.in);
  if (step.in.B < rows) return Backend::run(step);
  cpu::LstmStepPackedArgs args{.step = step,
                               .packed = kept ? kept + 1 : nullptr,
                               .packed_members = kept ? kept->members : 0,
                               .workspace = nullptr};
  const Scratch scratch(like, Backend::workspace_bytes(args));
  args.workspace = scratch.data();
  Backend::run(args);
}
#endif

}  // namespace seqkern
