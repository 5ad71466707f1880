// What kind of GPU a launch is for.
#pragma once

#include "cuda/launch.cuh"

namespace seqkern::cuda {

// The major number of the current device's; `op` is for messages.
inline int compute_capability(const char* op) {
  int device = 0, major = 0;
  const LaunchConfig config{.name = op};
  check(cudaGetDevice(&device), config);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), config);
  return major;
}

}  // namespace seqkern::cuda
