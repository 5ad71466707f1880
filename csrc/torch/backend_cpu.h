// The CPU: kernels run on row ranges in torch's own thread pool.
#pragma once

#include <sys/mman.h>

#include "cpu/attention_step_plan.h"
#include "cpu/kernels.h"
#include "torch/check.h"

namespace seqkern {

struct Cpu {
  // Targets can be looked at before the launch, and a bad one named.
  static constexpr bool kHostReadable = true;

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // Elements a thread should have at least: below, waking it costs more than it saves.
  static constexpr int64_t kGrainElements = 16384;

  template <class Kernel, class Args>
  static void rows(Kernel kernel, const Args& args, int64_t N, int64_t elements_per_row) {
    const int64_t grain =
        std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_row));
    torch::stable::parallel_for(0, N, grain,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  static void run(const CrossEntropyForwardArgs& a) {
    rows(cpu::cross_entropy_forward, a, a.in.N, a.in.V);
  }
  static void run(const CrossEntropyReduceArgs& a) { cpu::cross_entropy_reduce(a, 0, a.in.N); }
  static void run(const SampleArgs& a) {
    // Several passes a row, and histograms however short it is.
    rows(cpu::sample, a, a.B, 8 * a.V + 4096);
  }
  static void run(const CrossEntropyBackwardArgs& a) {
    rows(cpu::cross_entropy_backward, a, a.in.N, a.in.V);
  }

  static int64_t workspace_bytes(const AttentionStepArgs& a) {
    const int64_t item = a.dtype == DType::kFloat64 ? 8 : 4;
    return cpu::StepPlan(a).elements(a) * item;
  }
  static void run(const AttentionStepArgs& a) {
    const cpu::StepPlan plan(a);
    const int64_t keys = plan.runs == 1 ? a.positions[0] + a.S : cpu::kStepRun;
    rows(cpu::attention_step_prepare, a, a.B * a.NKV, 8 * a.S * a.D * (plan.group + 2));
    rows(cpu::attention_step, a, a.B * a.NKV * plan.runs, keys * a.D * plan.rows);
    rows(cpu::attention_step_combine, a, a.B * a.NH, 2 * a.S * a.D * plan.runs);
  }

  // A fresh buffer costs a page fault per 4 KB when first written, which is more than the
  // arithmetic of a row kernel; asked for in 2 MB pages, a sixth of it
  // (docs/math/cross_entropy.md).
  static void before_first_write(const Tensor& t) {
    constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
    const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t last = end & ~(kHugePage - 1);
#if defined(MADV_HUGEPAGE)
    // Advice only: where the kernel refuses it, pages are small and nothing else changes.
    if (last > first) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
};

using Backend = Cpu;

}  // namespace seqkern
