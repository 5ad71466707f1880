// How the linear layer of a step is cut into tasks on the CPU, and where its rows lie.
#pragma once

#include "common/host_device.h"
#include "ops/linear_step.h"

namespace seqkern::cpu {

// Outputs of a task: whole vectors of any instruction set, and the rows of a tile.
inline constexpr int64_t kStepOutputs = 16;

struct LinearStepPlan {
  int64_t groups;  // tasks
  int64_t stride;  // of a prepared row, in elements of the accumulator type: whole vectors

  SEQKERN_HD_INLINE explicit LinearStepPlan(const LinearStepArgs& a)
      : groups(ceil_div(a.M, kStepOutputs)), stride(ceil_div(a.K, int64_t{16}) * 16) {}
};

// Of bf16 weights in the matrix unit. Prepared rows are split into bf16 numbers that add up to
// them, and lie in tiles: [blocks, depths, parts, 16, columns] pairs of inputs. A tile has a column
// per row, at most 16, and the pairs of 32 inputs.
struct LinearStepTiles {
  static constexpr int64_t kMostColumns = 16, kDepth = 32, kPairBytes = 4;
  static constexpr int kMostGroups = 4;  // of outputs, that share loads of the rows

  int parts;      // 1 where a row holds bf16 numbers already, otherwise 3: any float
  int64_t width;  // of a row before it is split: whole depths
  int64_t depths, columns, blocks;
  int64_t rows_bytes;  // of the rows before they are split, which come first
  int64_t bytes;

  SEQKERN_HD_INLINE explicit LinearStepTiles(const LinearStepArgs& a)
      : parts(a.dtype == DType::kBFloat16 && a.norm == StepNorm::kNone ? 1 : 3),
        depths(ceil_div(a.K, kDepth)),
        columns(a.N < kMostColumns ? a.N : kMostColumns),
        blocks(ceil_div(a.N, kMostColumns)) {
    width = depths * kDepth;
    rows_bytes = a.N * width * static_cast<int64_t>(sizeof(float));
    bytes = rows_bytes + blocks * block_pairs() * kPairBytes;
  }
  // Groups of a task: about `some`, such that few are left over where a thread has enough of them.
  static SEQKERN_HD_INLINE int64_t whole_blocks(int64_t some, int64_t of_thread) {
    if (some >= kMostGroups) return some / kMostGroups * kMostGroups;
    return of_thread >= kMostGroups ? kMostGroups : some;
  }
  SEQKERN_HD_INLINE int64_t tile_pairs() const { return kDepth / 2 * columns; }
  SEQKERN_HD_INLINE int64_t block_pairs() const { return depths * parts * tile_pairs(); }
};

}  // namespace seqkern::cpu
