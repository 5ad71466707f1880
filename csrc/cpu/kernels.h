// Every CPU kernel, once: each ISA defines all of them, dispatch.cpp picks the ISA.
//
// A kernel works on the range [begin, end) of its own rows; threading is the caller's.
#pragma once

#include <cstdint>

#include "ops/cross_entropy.h"
#include "ops/lstm.h"

// X(kernel, Args)
#define SEQKERN_CPU_KERNELS(X)                        \
  X(cross_entropy_forward, CrossEntropyForwardArgs)   \
  X(cross_entropy_reduce, CrossEntropyReduceArgs)     \
  X(cross_entropy_backward, CrossEntropyBackwardArgs) \
  X(lstm_forward, LstmForwardArgs)                    \
  X(lstm_backward, LstmBackwardArgs)                  \
  X(lstm_cell_forward, LstmCellForwardArgs)           \
  X(lstm_cell_backward, LstmCellBackwardArgs)

// X(function, Args): bytes of Args::workspace.
#define SEQKERN_CPU_WORKSPACES(X)            \
  X(lstm_forward_workspace, LstmForwardArgs) \
  X(lstm_backward_workspace, LstmBackwardArgs)

#define SEQKERN_DECLARE_KERNEL(name, Args) void name(const Args& args, int64_t begin, int64_t end);
#define SEQKERN_DECLARE_WORKSPACE(name, Args) int64_t name(const Args& args);

namespace seqkern::cpu {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)  // dispatch.cpp
SEQKERN_CPU_WORKSPACES(SEQKERN_DECLARE_WORKSPACE)
namespace baseline {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_WORKSPACES(SEQKERN_DECLARE_WORKSPACE)
}  // namespace baseline
namespace avx2 {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_WORKSPACES(SEQKERN_DECLARE_WORKSPACE)
}  // namespace avx2
namespace avx512 {
SEQKERN_CPU_KERNELS(SEQKERN_DECLARE_KERNEL)
SEQKERN_CPU_WORKSPACES(SEQKERN_DECLARE_WORKSPACE)
}  // namespace avx512
}  // namespace seqkern::cpu
