// How the work of a resident kernel (resident.cuh) is split over blocks, and what memory each part
// takes. Host arithmetic only; docs/math/lstm_cuda.md has the reasons.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "common/host_device.h"
#include "cuda/launch.cuh"
#include "ops/recurrent.h"

namespace seqkern::cuda {

inline constexpr int kGates = 4;     // places for them; of a cell with fewer the rest is zero
inline constexpr int kUnits = 8;     // hidden units of a group: with their gates, one product
inline constexpr int kTileRows = 8;  // batch rows that products leave out together
inline constexpr int kPassShift = 5;
inline constexpr int kPassRows = 1 << kPassShift;  // rows of a pass: a thread per unit and row
inline constexpr int kMostSpan = 2;                // groups of a set
inline constexpr int kProductWarps = 8;            // which share the inner dimension of a product
inline constexpr int kProductThreads = kProductWarps * 32;
inline constexpr int kSlotBytes = 64 * kProductThreads;  // a chunk of every thread
static_assert(kProductThreads == kUnits * kPassRows);

inline constexpr int kStagePieces = 4;  // of 16 bytes per lane: what a warp brings at once
inline constexpr int kStageBytes = kStagePieces * 32 * 16;

struct ResidentPlan {
  int unit_blocks;   // blocks that share the units of a batch group
  int groups;        // of kUnits units, per block (the last block may have fewer)
  int span;          // groups of a set, 1 or 2, which a pass multiplies; groups is a multiple
  int batch_groups;  // of rows; each has unit_blocks blocks of its own, with all weights
  int rows;          // batch rows of a batch group, a multiple of kTileRows
  int pass_rows;     // kPassRows / span = 2^pass_shift(): together a thread per unit and row, too
  int passes;        // over the rows, in each step
  int chunks;        // of the inner dimension, per warp
  int gates;         // rows of the weights per unit, kGates at most
  int slots;         // chunks of a thread that are not in registers,
  int shared_slots;  // the first of which are in shared memory, the others in the workspace
  int inner_units;   // H, rounded up to whole chunks
  int row_elements;  // of an exchanged row
  unsigned smem;     // bytes
  int64_t flags_at, slots_at, bytes;  // of the workspace, where the exchanged rows come first

  SEQKERN_HD int blocks() const { return unit_blocks * batch_groups; }
  // Without divisions by what only the plan knows: they stand in each step.
  SEQKERN_HD int sets() const { return groups >> (span - 1); }
  SEQKERN_HD int pass_shift() const { return kPassShift + 1 - span; }
  SEQKERN_HD int states() const { return passes * sets(); }
  SEQKERN_HD int64_t launch_rows() const { return int64_t{batch_groups} * rows; }
  // Whether a thread has the same cell in all steps, for which there are kernels of their own.
  bool is_one() const { return states() == 1; }
};

// The plan for H units of `gates` in sets of `span` groups, with `buffers` of exchanged rows, or
// none (blocks() is 0) where the device cannot hold the blocks at once, or is older than what they
// use (ptx.cuh). `Product` is one of resident_product.cuh.
template <class Product>
ResidentPlan plan_span(const RecurrentInputs& r, const Device& device, int gates, int buffers,
                       int span) {
  ResidentPlan p = {};
  constexpr int64_t kAcc = sizeof(typename Product::Acc);
  constexpr int64_t kState = kProductThreads * kAcc;  // of a pass and set
  constexpr int64_t kFixed =
      kProductWarps * (Product::kPartials * kAcc + int64_t{Product::kStages} * kStageBytes);
  const int64_t budget = device.shared_bytes - 1024 - kFixed;     // 1024: static shared memory
  constexpr int kMostUnits = INT_MAX / (kPassRows * kGates * 8);  // bytes of a pass fit an int
  if (device.major < 8 || !device.cooperative || r.H > kMostUnits || r.T > INT_MAX / 2) return p;
  p.gates = gates;
  p.span = span;
  p.pass_rows = kPassRows / span;
  const int H = static_cast<int>(r.H);
  const int unit_groups = ceil_div(H, kUnits);
  p.groups = ceil_div(ceil_div(unit_groups, device.multiprocessors), span) * span;
  p.unit_blocks = ceil_div(unit_groups, p.groups);
  // Rows are independent: more of them at once before more of them one after the other.
  const int64_t tiles = ceil_div<int64_t>(r.B, kTileRows);
  const int64_t most_groups = std::min<int64_t>(device.multiprocessors / p.unit_blocks, tiles);
  // The state of all passes stays in shared memory: one pass at least, and within 32 KB.
  const int64_t pass_state = kState * p.sets();
  const int64_t most_passes =
      std::min(std::max<int64_t>(1, 32 * 1024 / pass_state), budget / pass_state);
  if (most_passes < 1) return {};
  const int64_t rows =
      std::min(ceil_div(tiles, most_groups) * kTileRows, most_passes * p.pass_rows);
  p.rows = static_cast<int>(rows);
  p.batch_groups = static_cast<int>(std::min(most_groups, ceil_div<int64_t>(r.B, rows)));
  p.passes = ceil_div(p.rows, p.pass_rows);
  const int all_chunks = ceil_div(H, Product::kChunkUnits);
  p.chunks = ceil_div(all_chunks, kProductWarps);
  p.inner_units = all_chunks * Product::kChunkUnits;
  p.row_elements = p.inner_units * Product::kInputs;
  p.slots = p.groups * p.chunks - span * std::min(p.chunks, Product::kHeldChunks / span);
  const int64_t state = kState * p.states();
  p.shared_slots = static_cast<int>(std::min<int64_t>(p.slots, (budget - state) / kSlotBytes));
  p.smem = static_cast<unsigned>(kFixed + state + int64_t{p.shared_slots} * kSlotBytes);
  const auto aligned = [](int64_t bytes) { return ceil_div<int64_t>(bytes, 128) * 128; };
  const int64_t exchanged = buffers * p.launch_rows() * p.row_elements *
                            static_cast<int64_t>(sizeof(typename Product::Element));
  p.flags_at = aligned(exchanged);
  p.slots_at = aligned(p.flags_at + int64_t{p.blocks()} * p.passes * 4);
  p.bytes = p.slots_at + int64_t{p.slots - p.shared_slots} * kSlotBytes * p.blocks();
  return p;
}

// Of the plans, the one whose blocks read the fewest exchanged rows. With two groups in each there
// are half as many blocks to share the units, so twice as many batch groups of half the rows; but
// the weights must have room.
template <class Product>
ResidentPlan plan_resident(const RecurrentInputs& r, const Device& device, int gates = kGates,
                           int buffers = 2) {
  const ResidentPlan one = plan_span<Product>(r, device, gates, buffers, 1);
  if (Product::kMostTiles == 1 || one.blocks() == 0) return one;
  const ResidentPlan two = plan_span<Product>(r, device, gates, buffers, kMostSpan);
  const bool fewer = two.blocks() > 0 && two.rows * two.sets() < one.rows * one.sets() &&
                     two.launch_rows() >= std::min(r.B, one.launch_rows());
  return fewer && two.slots == two.shared_slots ? two : one;
}

// The kernel over all B rows, as many at a time as the plan has room for.
template <class Args>
void launch_resident(const char* name, void (*kernel)(Args, ResidentPlan, int64_t), const Args& a,
                     const ResidentPlan& plan, int64_t B, cudaStream_t stream) {
  for (int64_t row = 0; row < B; row += plan.launch_rows()) {
    launch(kernel,
           {.name = name,
            .grid = static_cast<unsigned>(plan.blocks()),
            .block = kProductThreads,
            .smem = plan.smem,
            .cooperative = true,
            .stream = stream},
           a, plan, row);
  }
}

}  // namespace seqkern::cuda
