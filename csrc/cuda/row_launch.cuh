// How a launch over the rows of a matrix [N, V] is chosen: a warp or a block per row.
#pragma once

#include <climits>
#include <string>
#include <type_traits>

#include "common/errors.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace seqkern::cuda {

// Bytes of a row up to which a warp takes it alone: 8 packs per lane.
inline constexpr int64_t kWarpRowBytes = 8 * kWarp * 16;

template <class T>
bool warp_takes_row(int64_t V) {
  return V * static_cast<int64_t>(sizeof(T)) <= kWarpRowBytes;
}

inline void check_row_length(const char* name, int64_t V) {
  if (V > kMostElements) {
    throw_value_error(std::string(name) + ": rows must have at most " +
                      std::to_string(kMostElements) + " elements on CUDA, got " +
                      std::to_string(V));
  }
}

// Of the block that takes a row. N is not asked: a row's bits do not depend on how many there are.
template <class Group>
unsigned threads_of_row(int64_t packs) {
  unsigned threads = 128;
  while (threads < Group::kMaxThreads && packs >= int64_t{2 * Group::kLeastPacks} * threads)
    threads *= 2;
  return threads;
}

// Rows is anything with N and V.
template <class T, class Group, class Rows>
LaunchConfig config_of(const char* name, const Rows& rows, Stream stream) {
  int64_t blocks = rows.N;
  unsigned threads = 128;
  if constexpr (std::is_same_v<Group, WarpGroup>) {
    blocks = ceil_div<int64_t>(rows.N, threads / kWarp);
  } else {
    threads = threads_of_row<Group>(rows.V / kPack<T>);
  }
  if (blocks > INT_MAX) {
    throw_value_error(std::string(name) + ": too many rows for one launch, " +
                      std::to_string(rows.N));
  }
  return {.name = name, .grid = static_cast<unsigned>(blocks), .block = threads, .stream = stream};
}

}  // namespace seqkern::cuda
