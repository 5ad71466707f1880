// seqkern._C: importing it registers the CPU ops. It exports what is not an op.
#include <pybind11/pybind11.h>

#include <cstdlib>  // defines __GLIBC__ where that is the C library
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

bool keep_freed_memory() {
#ifdef __GLIBC__
  // Blocks with a mapping of their own go back when they are freed, and malloc allows no threshold
  // for that above 32 MiB; so none gets one. -1: what is free at the heap's end stays, too.
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, -1);
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // A name that is no instruction set of this processor is an error here, where it can be read: the
  // first kernel would ask in the middle of a parallel region.
  if (const char* forced = std::getenv("SEQKERN_FORCE_ISA"); forced && *forced) {
    (void)seqkern::cpu::active_isa();
  }
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
  m.def("keep_freed_memory", keep_freed_memory,
        "Have malloc keep what this process frees; False where malloc cannot be told so.");
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
