// Kernels for the emulator's own tests, some of them wrong on purpose. Each file of cases lists its
// own.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace seqkern::emulator {

struct Case {
  std::string name;
  std::function<bool()> run;  // whether the kernel's results are right
};

std::vector<Case> block_cases();
std::vector<Case> warp_cases();
std::vector<Case> global_cases();
std::vector<Case> grid_cases();
std::vector<Case> ptx_cases();
std::vector<Case> row_cases();

}  // namespace seqkern::emulator
