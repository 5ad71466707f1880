// `emulator_cases NAME SEED [unchecked]`: runs a case and prints "right" or "wrong"; a fault's
// message goes to stderr, with exit code 3. `emulator_cases list` prints the names.
#include "cases.h"

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "emulator.h"

int main(int argc, char** argv) {
  using namespace seqkern::emulator;
  std::vector<Case> cases;
  for (const auto& more :
       {block_cases(), global_cases(), warp_cases(), grid_cases(), ptx_cases(), row_cases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  const std::string name = argc > 1 ? argv[1] : "list";
  if (name == "list") {
    for (const Case& c : cases) std::puts(c.name.c_str());
    return 0;
  }
  set_seed(argc > 2 ? std::strtoull(argv[2], nullptr, 0) : 0);
  set_checks(argc < 4);
  for (const Case& c : cases) {
    if (c.name != name) continue;
    try {
      std::puts(c.run() ? "right" : "wrong");
      return 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 3;
    }
  }
  std::fprintf(stderr, "no case named %s\n", name.c_str());
  return 2;
}
