// The CPU: kernels run on row ranges in torch's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/attention_plan.h"
#include "cpu/attention_step_plan.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/linear_step_plan.h"
#include "torch/check.h"
#include "torch/host_gemm.h"
#include "torch/kept_memory.h"

namespace seqkern {

struct Cpu {
  // Whether GEMMs take 16-bit operands with a float result. Few CPUs multiply them fast, and
  // PyTorch without such units takes a hundred times as long as in float32: there, and in float16,
  // they are converted to float.
  static bool mixed_gemm(DType dtype) {
    return dtype == DType::kBFloat16 && cpu::multiplies_bf16();
  }
  // Whether a unit of its own multiplies them, beside the vector units.
  static bool matrix_unit() { return cpu::active_isa() == cpu::Isa::kAmx; }
  // Whether multiply() can add a product of 16-bit operands to what was there.
  static constexpr bool kAddsMixedProducts = true;
  // Logits are made in tiles that the softmax finds in cache.
  static constexpr bool kTiles = true;
  // Targets can be looked at before the launch, and a bad one named.
  static constexpr bool kHostReadable = true;

  // Whether w_ih x_t of an LSTM is one product before its kernel, not made by the kernel.
  static constexpr bool kInputProductFirst = false;

  // Whether rows that a kernel leaves for a product may be further apart than they are long.
  static constexpr bool kRowsApart = true;

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
  static void run(const SoftmaxForwardArgs& a) { rows(cpu::softmax_forward, a, a.N, a.V); }
  static void run(const SoftmaxBackwardArgs& a) { rows(cpu::softmax_backward, a, a.N, a.V); }
  static void run(const SampleArgs& a) {
    // Several passes a row, and histograms however short it is.
    rows(cpu::sample, a, a.B, 8 * a.V + 4096);
  }
  static int64_t workspace_bytes(const SampleArgs&) { return 0; }
  static void run(const CrossEntropyBackwardArgs& a) {
    rows(cpu::cross_entropy_backward, a, a.in.N, a.in.V);
  }

  // Threads that a recurrence is worth: a step of each, of so many multiply-adds in all, should
  // take longer than their meeting.
  static int64_t team_members(int64_t products) {
    constexpr int64_t kProductsOfAMember = 32768;
    const int64_t threads = torch::stable::get_num_threads();
    return std::clamp<int64_t>(products / kProductsOfAMember, 1, threads);
  }
  static int64_t team_members(const RecurrentInputs& r, int64_t gates) {
    return team_members(r.B * gates * r.H * r.P);
  }

  template <class Kernel, class Args>
  static void team(Kernel kernel, const Args& args, int64_t members) {
    torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
      for (int64_t member = begin; member < end; ++member) kernel(args, members, member);
    });
  }

  // Rows from which a gradient of weights is made by our own kernel; below, ATen's is as good.
  static constexpr int64_t kGradientRows = 16;

  // Multiply-adds a thread should have at least of a product over a sequence.
  static constexpr int64_t kGrainProduct = 1 << 20;

  static int64_t dense_members(const cpu::DenseArgs& a) {
    constexpr int64_t kRowsThatPackingTakes = 8;
    return std::clamp<int64_t>((a.N + kRowsThatPackingTakes) * a.M * a.K / kGrainProduct, 1,
                               torch::stable::get_num_threads());
  }
  static void run(const cpu::DenseArgs& a) {
    const int64_t members = dense_members(a);
    cpu::dense_prepare(a, members);
    team(cpu::dense, a, members);
  }
  static int64_t workspace_bytes(const cpu::DenseArgs& a) {
    return cpu::dense_workspace(a, dense_members(a));
  }

  static int64_t gradient_members(const cpu::WeightGradientArgs& a) {
    int64_t K = 0;
    for (int i = 0; i < a.count; ++i) K += a.parts[i].K;
    return std::clamp<int64_t>(a.N * a.M * K / kGrainProduct, 1, torch::stable::get_num_threads());
  }
  static void run(const cpu::WeightGradientArgs& a) {
    const int64_t members = gradient_members(a);
    cpu::weight_gradient_prepare(a, members);
    team(cpu::weight_gradient, a, members);
  }
  static int64_t workspace_bytes(const cpu::WeightGradientArgs& a) {
    return cpu::weight_gradient_workspace(a, gradient_members(a));
  }

  static void run(const cpu::EmbeddingGradientArgs& a) {
    const int64_t items = (a.W + cpu::kGradientColumns - 1) / cpu::kGradientColumns;
    rows(cpu::embedding_gradient, a, items, (a.N + a.V) * cpu::kGradientColumns);
  }

  static void run(const LstmForwardArgs& a) {
    const int64_t members = team_members(a.in.r, 4);
    cpu::lstm_forward_prepare(a, members);
    team(cpu::lstm_forward, a, members);
  }
  static void run(const LstmBackwardArgs& a) {
    const int64_t members = team_members(a.in.r, 4);
    cpu::lstm_backward_prepare(a, members);
    team(cpu::lstm_backward, a, members);
  }
  static void run(const HiddenForwardArgs& a) {
    const int64_t members = team_members(a.r, gates_of(a.cell));
    cpu::hidden_forward_prepare(a, members);
    team(cpu::hidden_forward, a, members);
  }
  static void run(const HiddenBackwardArgs& a) {
    const int64_t members = team_members(a.r, gates_of(a.cell));
    cpu::hidden_backward_prepare(a, members);
    team(cpu::hidden_backward, a, members);
  }
  static void run(const cpu::CellStepGatesArgs& a) {
    rows(cpu::cell_step_gates, a, a.step.in.B, 4 * a.step.in.H);
  }

  static bool has_bf16_products() {
    const cpu::Isa isa = cpu::active_isa();
    return isa == cpu::Isa::kAmx || isa == cpu::Isa::kAvx512Bf16;
  }

  // Rows from which one step is worth packing its weights for: what they cost otherwise is to be
  // converted again for every few rows, or, in parts of vectors, to be read element by element.
  static int64_t step_pack_rows(const cpu::CellStepInputs& in) {
    const cpu::Isa isa = cpu::active_isa();
    if (in.dtype == DType::kBFloat16) return 5;
    if (in.dtype == DType::kFloat16) return isa == cpu::Isa::kAmx ? 24 : 8;
    if (in.dtype == DType::kFloat64) return 8;
    const bool whole = in.I % 16 == 0 && in.H % 16 == 0;
    return !whole ? 6 : isa >= cpu::Isa::kAvx512 ? 32 : 16;
  }

  // The same where the packed weights are there already.
  static int64_t step_kept_rows(const cpu::CellStepInputs& in) {
    constexpr int64_t kRows = 12;
    if (in.dtype == DType::kBFloat16 && has_bf16_products()) return 1;
    return std::min(kRows, step_pack_rows(in));
  }

  // Rows from which its backward is better made as products of packed operands. Until then weights
  // are read where they are: large ones once, small ones from cache by eight rows at a time.
  static int64_t step_backward_pack_rows(const cpu::CellStepInputs& in) {
    if (in.dtype == DType::kBFloat16 && has_bf16_products()) return 24;
    constexpr int64_t kCached = 1 << 20, kLarge = 1 << 24, kFewBytes = 3 << 20;
    const int64_t numbers = gates_of(in.cell) * in.H * (in.I + in.H);
    if (numbers > kCached) return numbers < kLarge ? 64 : 96;
    // 16-bit ones are converted for each eight rows.
    if (in.dtype == DType::kFloat16 || in.dtype == DType::kBFloat16) return 96;
    return numbers * (in.dtype == DType::kFloat64 ? 8 : 4) < kFewBytes ? 256 : 96;
  }

  static int64_t step_members(const cpu::CellStepInputs& in) {
    return team_members(in.B * gates_of(in.cell) * in.H * (in.I + in.H));
  }
  static void run(const cpu::CellStepForwardArgs& a) {
    const int64_t items = (a.in.H + cpu::kStepUnits - 1) / cpu::kStepUnits;
    const int64_t gates = gates_of(a.in.cell);
    rows(cpu::cell_step_forward, a, items,
         a.in.B * gates * cpu::kStepUnits * (a.in.I + a.in.H) / 4);
  }
  static void run(const cpu::CellStepPackArgs& a) {
    team(cpu::cell_step_pack, a, team_members(a.G * a.H * (a.I + a.H)));
  }
  static int64_t workspace_bytes(const cpu::CellStepPackArgs& a) {
    return cpu::cell_step_pack_workspace(a, 1);
  }
  static void run(const cpu::CellStepPackedArgs& a) {
    const int64_t members = step_members(a.step.in);
    cpu::cell_step_packed_prepare(a, members);
    team(cpu::cell_step_packed, a, members);
  }
  static int64_t workspace_bytes(const cpu::CellStepPackedArgs& a) {
    return cpu::cell_step_packed_workspace(a, step_members(a.step.in));
  }
  static void run(const cpu::CellStepBackwardArgs& a) {
    const int64_t members = step_members(a.in);
    cpu::cell_step_backward_prepare(a, members);
    team(cpu::cell_step_backward, a, members);
  }
  static int64_t workspace_bytes(const cpu::CellStepBackwardArgs& a) {
    return cpu::cell_step_backward_workspace(a, step_members(a.in));
  }

  static int64_t workspace_bytes(const LstmForwardArgs& a) {
    return cpu::lstm_forward_workspace(a, team_members(a.in.r, 4));
  }
  static int64_t workspace_bytes(const LstmBackwardArgs& a) {
    return cpu::lstm_backward_workspace(a, team_members(a.in.r, 4));
  }
  static int64_t workspace_bytes(const HiddenForwardArgs& a) {
    return cpu::hidden_forward_workspace(a, team_members(a.r, gates_of(a.cell)));
  }
  static int64_t workspace_bytes(const HiddenBackwardArgs& a) {
    return cpu::hidden_backward_workspace(a, team_members(a.r, gates_of(a.cell)));
  }

  static void run(const LinearCrossEntropyStateArgs& a) {
    rows(cpu::linear_cross_entropy_state, a, a.rows.N, a.tile.width);
  }
  static void run(const LinearCrossEntropyFinishArgs& a) {
    rows(cpu::linear_cross_entropy_finish, a, a.rows.N, 16);
  }
  static void run(const LinearCrossEntropyGradientArgs& a) {
    rows(cpu::linear_cross_entropy_gradient, a, a.rows.N, a.tile.width);
  }

  static void run(const ColumnSumsArgs& a) {
    rows(cpu::linear_cross_entropy_column_sums, a, a.width, a.N);
  }

  // out = a b (+ out), of one dtype, float32 or float64; or of bf16 with a float32 result.
  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
    const int64_t N = a.size(0), K = a.size(1), M = b.size(1);
    const ScalarType type = a.scalar_type();
    // Of few rows the packing of the other operand takes as long as the product.
    constexpr int64_t kFewestRows = 32;
    const bool in_panels =
        type == ScalarType::Float && std::min(N, M) >= kFewestRows && cpu::multiplies_floats();
    if (type == out.scalar_type() && !in_panels) return host_multiply(out, a, b, accumulate);
    cpu::PanelProductArgs args{.dtype = in_panels ? DType::kFloat32 : DType::kBFloat16,
                               .K = K,
                               .a = {.data = a.const_data_ptr(),
                                     .size = N,
                                     .stride = a.stride(0),
                                     .k_stride = a.stride(1)},
                               .b = {.data = b.const_data_ptr(),
                                     .size = M,
                                     .stride = b.stride(1),
                                     .k_stride = b.stride(0)},
                               .out = static_cast<float*>(out.mutable_data_ptr()),
                               .out_stride = out.stride(0),
                               .accumulate = accumulate,
                               .workspace = nullptr};
    // Products that a thread should have at least: below, waking it costs more than it saves.
    constexpr int64_t kProductsOfAMember = 1 << 21;
    const int64_t members = std::clamp<int64_t>(N * M / 64 * K / (kProductsOfAMember / 64), 1,
                                                torch::stable::get_num_threads());
    const KeptMemory<KeptScratch> workspace(cpu::panel_product_workspace(args, members));
    args.workspace = workspace.data();
    cpu::panel_product_prepare(args, members);
    team(cpu::panel_product, args, members);
  }

  // Multiplications a thread should have at least, as kGrainElements.
  static constexpr int64_t kGrainWork = 1 << 18;

  // Tasks of uneven length, the longest first, of `work` together. Each thread takes the next of
  // its share until none is left, and then of the others': from call to call it meets what its
  // cache still holds.
  template <class Kernel, class Args>
  static void tasks(Kernel kernel, const Args& args, int64_t count, int64_t work) {
    const int64_t threads = std::min<int64_t>(
        {torch::stable::get_num_threads(), count, std::max<int64_t>(1, work / kGrainWork)});
    struct alignas(64) Share {
      std::atomic<int64_t> taken{0};
    };
    const auto shares = std::make_unique<Share[]>(static_cast<size_t>(threads));
    torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
      for (int64_t i = 0; i < threads; ++i) {
        const int64_t share = (own + i) % threads;
        const auto next = [&] {
          return shares[share].taken.fetch_add(1, std::memory_order_relaxed) * threads + share;
        };
        for (int64_t task; (task = next()) < count;) kernel(args, task, task + 1);
      }
    });
  }

  static int64_t workspace_bytes(const AttentionForwardArgs&) { return 0; }
  static int64_t workspace_bytes(const AttentionBackwardArgs& a) {
    return cpu::attention_backward_workspace(a);
  }
  static void run(const AttentionForwardArgs& a) {
    tasks(cpu::attention_forward, a, cpu::attention_forward_tasks(a), cpu::attention_work(a.in));
  }
  static void run(const AttentionBackwardArgs& a) {
    const cpu::AttentionBackwardPlan plan(a.in);
    const int64_t work = cpu::attention_work(a.in);
    tasks(cpu::attention_backward, a, plan.tasks, 2 * work);
    tasks(cpu::attention_sum_dq, a, plan.sum_tasks, work);
  }

  // Partial results, and for each key head how many of its runs are done.
  static int64_t workspace_bytes(const AttentionStepArgs& a) {
    return partial_bytes(a) + a.B * a.NKV * static_cast<int64_t>(sizeof(int32_t));
  }
  static int64_t partial_bytes(const AttentionStepArgs& a) {
    const int64_t item = a.dtype == DType::kFloat64 ? 8 : 4;
    return cpu::StepPlan(a).elements(a) * item;
  }
  static void run(const AttentionStepArgs& a) {
    const cpu::StepPlan plan(a);
    rows(cpu::attention_step_prepare, a, a.B * a.NKV,
         (a.cos ? 8 : 1) * a.S * a.D * (plan.group + 2));
    auto* done = reinterpret_cast<int32_t*>(static_cast<char*>(a.workspace) + partial_bytes(a));
    std::fill_n(done, a.B * a.NKV, 0);
    // Whoever ends a head's last run combines them: no second meeting of the threads.
    const auto attend = [&](const AttentionStepArgs& args, int64_t task, int64_t end) {
      cpu::attention_step(args, task, end);
      const int64_t head = task / plan.runs;
      if (plan.runs == 1 || std::atomic_ref(done[head]).fetch_add(1) == plan.runs - 1) {
        cpu::attention_step_combine(args, head * plan.group, (head + 1) * plan.group);
      }
    };
    const int64_t keys = plan.runs == 1 ? a.positions[0] + a.S : plan.runs * cpu::kStepRun;
    const int64_t heads = a.B * a.NKV;
    // Reading the cache is what takes time: a multiplication of a step counts as four.
    tasks(attend, a, heads * plan.runs, 8 * heads * keys * a.D * plan.rows);
  }

  // Whether a weight is multiplied in the matrix unit.
  static bool in_tiles(const LinearStepArgs& a) {
    return matrix_unit() && a.weight_dtype == DType::kBFloat16;
  }
  static int64_t workspace_bytes(const LinearStepArgs& a) {
    if (in_tiles(a)) return cpu::LinearStepTiles(a).bytes;
    return a.N * cpu::LinearStepPlan(a).stride * (a.dtype == DType::kFloat64 ? 8 : 4);
  }
  static void run(const LinearStepArgs& a) {
    const bool tiles = in_tiles(a);
    const int64_t groups = cpu::LinearStepPlan(a).groups;
    if (tiles) {
      const cpu::LinearStepTiles plan(a);
      rows(cpu::linear_step_tiles_prepare, a, plan.blocks, 4 * plan.columns * a.K);
    } else {
      rows(cpu::linear_step_prepare, a, a.N, 4 * a.K);
    }
    // Long enough that memory is read in long stretches, short enough that threads end together.
    constexpr int64_t kTaskBytes = 512 << 10, kTasksOfAThread = 4;
    const int64_t item = a.weight_dtype == DType::kFloat64   ? 8
                         : a.weight_dtype == DType::kFloat32 ? 4
                                                             : 2;
    const int64_t outputs = cpu::kStepOutputs * (a.gated ? 2 : 1);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::max<int64_t>(1, kTaskBytes / (outputs * a.K * item));
    int64_t some = std::clamp<int64_t>(groups / (kTasksOfAThread * threads), 1, most);
    if (tiles) some = cpu::LinearStepTiles::whole_blocks(some, groups / threads);
    const auto kernel = tiles ? cpu::linear_step_tiles : cpu::linear_step;
    const auto project = [&](const LinearStepArgs& args, int64_t task, int64_t) {
      kernel(args, task * some, std::min(groups, (task + 1) * some));
    };
    // Reading a weight takes longer than multiplying by it.
    const int64_t work = 2 * groups * outputs * a.K * a.N;
    tasks(project, a, ceil_div(groups, some), work);
  }

  // A fresh buffer costs a page fault per 4 KB when first written, which is more than the
  // arithmetic of a row kernel; asked for in 2 MB pages, a sixth of it
  // (docs/math/cross_entropy.md).
  static void before_first_write(const Tensor& t) {
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    ask_for_huge_pages(begin, begin + static_cast<uintptr_t>(t.numel()) * t.element_size());
  }
};

using Backend = Cpu;

}  // namespace seqkern
