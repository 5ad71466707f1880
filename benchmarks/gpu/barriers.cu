// What it costs that blocks wait for each other: the latency of one step of a persistent kernel.
//
//   nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a barriers.cu -o barriers && ./barriers
//
// Prints CSV: kind, blocks (of 256 threads), cluster size, nanoseconds per barrier. Kinds:
//   grid     cooperative_groups' grid.sync()
//   flags    each block publishes its epoch, all threads poll all blocks' epochs
//   copies   16 bytes of each block stored before its epoch, and read by all threads after it
//   values   the same 16 bytes, read until all of them are of this epoch: no flags
//   cluster  the hardware barrier of a thread-block cluster
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kRounds = 2000;
constexpr int kSamples = 11;
constexpr int kWords = 9;  // of memory per block, at most

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

__global__ void grid_kernel(unsigned*, int rounds) {
  for (int i = 0; i < rounds; ++i) cg::this_grid().sync();
}

__device__ unsigned load_acquire(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

__device__ void store_release(unsigned* p, unsigned x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// epochs [gridDim.x], zero before.
__global__ void flags_kernel(unsigned* epochs, int rounds) {
  for (unsigned epoch = 1; epoch <= static_cast<unsigned>(rounds); ++epoch) {
    __syncthreads();  // the block's own work of the step is done before it is published
    if (threadIdx.x == 0) store_release(epochs + blockIdx.x, epoch);
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      while (load_acquire(epochs + b) < epoch) {
      }
    }
    __syncthreads();  // no thread goes on before all epochs were seen
  }
}

__device__ void store_relaxed(unsigned* p, unsigned x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

__device__ uint4 load_relaxed(const unsigned* p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}

__device__ bool is_of(uint4 x, unsigned epoch) {
  return min(min(x.x, x.y), min(x.z, x.w)) >= epoch;
}

// What a step of a recurrent layer hands over, in one of two buffers: memory [2, gridDim.x, 4] and,
// with kFlags, [gridDim.x] of flags behind it. All zero before.
template <bool kFlags>
__global__ void exchange_kernel(unsigned* memory, int rounds) {
  unsigned* epochs = memory + 8 * gridDim.x;
  for (unsigned epoch = 1; epoch <= static_cast<unsigned>(rounds); ++epoch) {
    unsigned* values = memory + epoch % 2 * 4 * gridDim.x;
    // The last 4 threads, which poll for no block where there are fewer than threads.
    const unsigned t = threadIdx.x - (blockDim.x - 4);
    if (t < 4) store_relaxed(values + 4 * blockIdx.x + t, epoch);
    if (kFlags) {
      __syncthreads();
      if (threadIdx.x == 0) store_release(epochs + blockIdx.x, epoch);
    }
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      if (kFlags) {
        while (load_acquire(epochs + b) < epoch) {
        }
        if (!is_of(load_relaxed(values + 4 * b), epoch)) __trap();
      } else {
        while (!is_of(load_relaxed(values + 4 * b), epoch)) {
        }
      }
    }
    __syncthreads();  // no thread goes on before all values were seen
  }
}

__global__ void cluster_kernel(unsigned*, int rounds) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < rounds; ++i) cg::this_cluster().sync();
#endif
}

using Kernel = void (*)(unsigned*, int);

struct Launch {
  const char* kind;
  Kernel kernel;
  int blocks, cluster;
  bool cooperative;
};

// Milliseconds of one launch, or a negative number where the device refuses it.
float milliseconds(const Launch& l, unsigned* epochs, int rounds) {
  check(cudaMemset(epochs, 0, kWords * sizeof(unsigned) * l.blocks), "memset");
  if (l.cluster > 8) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(l.kernel),
                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
  }
  cudaLaunchAttribute attributes[2];
  int n = 0;
  if (l.cooperative) {
    attributes[n].id = cudaLaunchAttributeCooperative;
    attributes[n++].val.cooperative = 1;
  }
  if (l.cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n].val.clusterDim.x = static_cast<unsigned>(l.cluster);
    attributes[n].val.clusterDim.y = 1;
    attributes[n++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.blocks));
  config.blockDim = dim3(kThreads);
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(n);
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  check(cudaEventRecord(start), "record");
  const cudaError_t status = cudaLaunchKernelEx(&config, l.kernel, epochs, rounds);
  check(cudaEventRecord(stop), "record");
  check(cudaEventSynchronize(stop), "kernel");
  float ms = -1;
  if (status == cudaSuccess) {
    check(cudaEventElapsedTime(&ms, start, stop), "elapsed");
  } else {
    std::fprintf(stderr, "%s %d x %d: %s\n", l.kind, l.blocks, l.cluster,
                 cudaGetErrorString(status));
    cudaGetLastError();
  }
  check(cudaEventDestroy(start), "event");
  check(cudaEventDestroy(stop), "event");
  return ms;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  const int sms = device.multiProcessorCount;
  unsigned* epochs;
  check(cudaMalloc(&epochs, kWords * sizeof(unsigned) * static_cast<size_t>(sms)), "malloc");
  std::vector<Launch> launches;
  for (int blocks : {16, 64, sms}) {
    launches.push_back({"grid", grid_kernel, blocks, 1, true});
    launches.push_back({"flags", flags_kernel, blocks, 1, true});
    launches.push_back({"copies", exchange_kernel<true>, blocks, 1, true});
    launches.push_back({"values", exchange_kernel<false>, blocks, 1, true});
  }
  if (device.major >= 9) {
    for (int cluster : {2, 4, 8, 16}) {
      launches.push_back({"cluster", cluster_kernel, cluster, cluster, false});
      launches.push_back({"cluster", cluster_kernel, sms / 2 / cluster * cluster,
                          cluster, false});
    }
  }
  std::printf("kind,blocks,cluster,ns\n");
  for (const Launch& l : launches) {
    std::vector<float> samples;
    for (int i = 0; i < kSamples; ++i) {
      // The difference of two lengths leaves the launch out.
      const float one = milliseconds(l, epochs, kRounds), two = milliseconds(l, epochs, 2 * kRounds);
      if (one < 0 || two < 0) break;
      samples.push_back((two - one) * 1e6f / kRounds);
    }
    if (samples.empty()) continue;
    std::sort(samples.begin(), samples.end());
    std::printf("%s,%d,%d,%.0f\n", l.kind, l.blocks, l.cluster, samples[samples.size() / 2]);
  }
  check(cudaFree(epochs), "free");
  return 0;
}
