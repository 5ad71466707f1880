// Runs one translated kernel for harness.py, which gives its parameters.
#include <stdexcept>
#include <string>

#include "ptx.h"

namespace seqkern::emulator::ptx {
Kernel to_launch(const char* name);
}

namespace {
std::string said;
}

// Null, or why the launch ended.
extern "C" __attribute__((visibility("default"))) const char* seqkern_ptx_run(
    const char* name, unsigned blocks, unsigned threads, unsigned shared, int cooperative,
    const void* const* parameters) {
  const auto kernel = seqkern::emulator::ptx::to_launch(name);
  if (!kernel) return "no such kernel";
  cudaLaunchAttribute attribute = {cudaLaunchAttributeCooperative, {.cooperative = cooperative}};
  const cudaLaunchConfig_t config = {blocks, threads, shared, nullptr, &attribute, 1};
  try {
    const auto status =
        seqkern::emulator::run_grid(config, reinterpret_cast<const void*>(kernel),
                                    [&] { kernel(parameters); }, {parameters, sizeof(*parameters)});
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}
