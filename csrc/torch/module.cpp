// seqkern._C: importing it registers the CPU ops. It exports what is not an op.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "seqkern's CPU kernels (registered as torch.ops.seqkern on import) and build facts";
  m.def(
      "cpu_isa", [] { return seqkern::cpu::isa_name(seqkern::cpu::active_isa()); },
      "Instruction set the CPU kernels run on: 'amx', 'avx512_bf16', 'avx512', 'avx2' or "
      "'baseline'.");
  m.def(
      "cpu_isas",
      [] {
        py::list names;
        for (const seqkern::cpu::Isa isa : seqkern::cpu::kFastestFirst) {
          if (seqkern::cpu::supported(isa)) names.append(seqkern::cpu::isa_name(isa));
        }
        return names;
      },
      "Instruction sets of this processor that there are CPU kernels for, the fastest first.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SEQKERN_VERSION;
        info["compiler"] = SEQKERN_COMPILER;
        info["torch_built_with"] = SEQKERN_TORCH_BUILT_WITH;
        info["cuda_toolkit"] = SEQKERN_CUDA_TOOLKIT;
        info["cuda_architectures"] = SEQKERN_CUDA_ARCHITECTURES;
        return info;
      },
      "Facts of this build; cuda_toolkit and cuda_architectures are '' where no CUDA kernels were "
      "built.");
}
