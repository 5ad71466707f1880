// Launching a kernel, and its shared memory: what the host emulator (tests/emulator) also
// understands.
//
// g++ cannot parse <<<>>>, and a bare __shared__ variable has no meaning there: shared memory must
// exist once per live block. So kernels launch through launch() and take memory from shared() and
// dynamic_shared().
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace seqkern::cuda {

struct LaunchConfig {
  const char* name;  // of the op, for messages
  dim3 grid = 1;
  dim3 block = 1;
  unsigned smem = 0;         // bytes of dynamic shared memory
  unsigned cluster = 1;      // blocks per cluster along x
  bool cooperative = false;  // all blocks resident at once, so that the grid can synchronise
  cudaStream_t stream = nullptr;
};

inline void check(cudaError_t status, const LaunchConfig& config) {
  if (status == cudaSuccess) return;
  // Taken off the runtime's record, or the next launch would report it again.
  static_cast<void>(cudaGetLastError());
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    throw std::runtime_error(std::string(config.name) +
                             ": seqkern's CUDA kernels were not built for this GPU; `seqkern "
                             "doctor` says for which, TORCH_CUDA_ARCH_LIST chooses others");
  }
  throw std::runtime_error(std::string(config.name) + ": CUDA launch of " +
                           std::to_string(config.grid.x) + " blocks of " +
                           std::to_string(config.block.x) + " threads with " +
                           std::to_string(config.smem) +
                           " bytes of shared memory failed: " + cudaGetErrorString(status));
}

// The limit belongs to kernel and device, not to a launch: it is raised where a launch needs more,
// and never lowered, or the launch of another thread that raised it could fail.
inline std::mutex shared_limits_mutex;
inline std::map<std::pair<const void*, int>, unsigned> shared_limits;

inline void raise_shared_limit(const void* kernel, const LaunchConfig& config) {
  int device = 0;
  check(cudaGetDevice(&device), config);
  const std::lock_guard<std::mutex> lock(shared_limits_mutex);
  unsigned& limit = shared_limits[{kernel, device}];
  if (config.smem <= limit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.smem)),
        config);
  limit = config.smem;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, const Args&... args) {
  // A block has 48 KB without asking, of which static shared memory takes its part.
  constexpr unsigned kWithoutAsking = 32 * 1024;
  if (config.smem > kWithoutAsking) {
    raise_shared_limit(reinterpret_cast<const void*>(kernel), config);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch = {};
  launch.gridDim = config.grid;
  launch.blockDim = config.block;
  launch.dynamicSmemBytes = config.smem;
  launch.stream = config.stream;
  launch.attrs = attributes;
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  check(cudaLaunchKernelEx(&launch, kernel, args...), config);
}

// What a launch is planned with. Asking waits for nothing, so a graph can be captured meanwhile.
struct Device {
  int major;  // of its compute capability
  int multiprocessors;
  int shared_bytes;  // that one block may ask for
  bool cooperative;  // launches
};

inline Device current_device() {
  const LaunchConfig asking = {.name = "device"};
  int device = 0;
  check(cudaGetDevice(&device), asking);
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), asking);
    return value;
  };
  return {.major = attribute(cudaDevAttrComputeCapabilityMajor),
          .multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
          .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          .cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0};
}

// The block's one object of type S, uninitialised. Two calls with the same type are the same
// object.
template <class S>
__device__ __forceinline__ S& shared() {
#if defined(__CUDACC__)
  __shared__ alignas(S) unsigned char storage[sizeof(S)];
  return *reinterpret_cast<S*>(storage);
#else
  static char type_of_block_object;
  return *static_cast<S*>(emulator::static_shared(&type_of_block_object, sizeof(S), alignof(S)));
#endif
}

// The block's LaunchConfig::smem bytes, 128-byte aligned (what bulk copies need).
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char seqkern_dynamic_shared[];
  return reinterpret_cast<T*>(seqkern_dynamic_shared);
#else
  return static_cast<T*>(emulator::dynamic_shared());
#endif
}

}  // namespace seqkern::cuda
