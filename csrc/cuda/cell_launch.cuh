// The launch of a cell's pointwise kernels: a thread for each unit of a row, or for a run of them.
#pragma once

#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/launch.cuh"

namespace seqkern::cuda {

inline constexpr unsigned kCellThreads = 128;

inline LaunchConfig cell_config(const char* name, int64_t threads, cudaStream_t stream) {
  const int64_t blocks = (threads + kCellThreads - 1) / kCellThreads;
  if (blocks > INT_MAX) {
    throw_value_error(std::string(name) + ": too many units for one launch, " +
                      std::to_string(threads));
  }
  return {
      .name = name, .grid = static_cast<unsigned>(blocks), .block = kCellThreads, .stream = stream};
}

}  // namespace seqkern::cuda
