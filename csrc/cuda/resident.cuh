// A kernel that stays on the device for a whole sequence, its recurrent weights in registers and
// shared memory: what a block of it holds, and how blocks hand each other the states.
//
// A batch group of blocks owns some batch rows; its blocks share the hidden units. In round n every
// block reads what all of them exchanged in round n - 1 and exchanges its own units' values, in the
// other one of two buffers. Rows go through in passes of kPassRows, each with flags of its own: the
// number of rounds a block has exchanged of the pass.
//
// Ordering, for a value that block X exchanges in round n and block Y reads in round n + 1:
//   X: threads store values; __syncthreads; thread 0: store_release(flag of X, n + 1)
//   Y: a lane: load_acquire(flag of X) >= n + 1; __syncwarp; the warp's lanes copy values
// The release takes along what the barrier ordered before it, and the acquire goes on to the warp
// through __syncwarp, so each store happens before the copies are started (cp.async of 16 bytes,
// which reads L2 and leaves L1 alone).
//
// That X in round n + 1 does not overwrite (buffers alternate) what Y still reads in round n:
//   Y: copies of round n, waited for; __syncthreads (before its sums); store_release(flag of Y,
//      n + 1)
//   X: each warp waits for n + 1 from the blocks whose units it reads, in round n + 1; the warps of
//      X together read all units; __syncthreads (before its sums); only then X's stores of the
//      round.
// Flags only grow within a launch, and begin at 0 in each: start() clears them, and a barrier of
// the grid orders that before any wait. So a launch needs nothing of what the workspace held.
#pragma once

#include <cooperative_groups.h>

#include "cuda/recurrent.cuh"
#include "cuda/resident_product.cuh"

namespace seqkern::cuda {

// Calls f(std::integral_constant<int, i>) for i from 0 to n - 1.
template <int n, class F>
__device__ __forceinline__ void static_for(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

// A unit of a batch row: a thread has one in each pass and group.
struct Cell {
  int row;   // of the pass
  int u;     // of the group
  int unit;  // of the layer
  int64_t b;
  bool valid;
};

template <class Product>
class Resident {
 public:
  using T = typename Product::Element;
  using Acc = typename Product::Acc;

  __device__ Resident(const ResidentPlan& plan, const RecurrentInputs& r, void* workspace,
                      int64_t first_row)
      : plan_(plan), r_(r) {
    const int batch_group = static_cast<int>(blockIdx.x) / plan.unit_blocks;
    unit_block_ = static_cast<int>(blockIdx.x) % plan.unit_blocks;
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    first_ = first_row + static_cast<int64_t>(batch_group) * plan.rows;
    const int64_t rows = r.B - first_;
    rows_ = static_cast<int>(rows < 0 ? 0 : rows < plan.rows ? rows : int64_t{plan.rows});
    const int all_chunks = plan.inner_units / Product::kChunkUnits;
    first_chunk_ = min(warp_ * plan.chunks, all_chunks);
    chunks_ = min(plan.chunks, all_chunks - first_chunk_);
    warps_ = (all_chunks + plan.chunks - 1) / plan.chunks;

    partials_ = dynamic_shared<Acc>();
    state_ = partials_ + kProductWarps * Product::kPartials;
    uint4* stages = reinterpret_cast<uint4*>(state_ + plan.passes * plan.groups * kProductThreads);
    stages_ = stages + warp_ * Product::kStages * kStagePieces * kWarp;
    shared_slots_ = stages + kProductWarps * Product::kStages * kStagePieces * kWarp;
    char* base = static_cast<char*>(workspace);
    own_rows_ = reinterpret_cast<T*>(base) +
                static_cast<int64_t>(batch_group) * plan.rows * plan.row_elements;
    buffer_elements_ = plan.launch_rows() * plan.row_elements;
    flags_ = reinterpret_cast<uint32_t*>(base + plan.flags_at) +
             static_cast<int64_t>(batch_group) * plan.passes * plan.unit_blocks;
    other_slots_ =
        reinterpret_cast<uint4*>(base + plan.slots_at) +
        static_cast<int64_t>(blockIdx.x) * (plan.slots - plan.shared_slots) * (kSlotBytes / 16);
  }

  // ---------------------------------------------------------------- extent

  __device__ int passes() const { return (rows_ + kPassRows - 1) / kPassRows; }
  __device__ int groups() const { return plan_.groups; }

  // Rows of the pass, rounded up to tiles.
  __device__ int pass_rows(int pass) const {
    const int rest = rows_ - pass * kPassRows;
    return rest >= kPassRows ? kPassRows : (rest + kTileRows - 1) / kTileRows * kTileRows;
  }

  // Neighbouring threads have neighbouring units.
  __device__ Cell cell(int pass, int group) const {
    Cell c;
    c.row = static_cast<int>(threadIdx.x) / kUnits;
    c.u = static_cast<int>(threadIdx.x) % kUnits;
    c.unit = (unit_block_ * plan_.groups + group) * kUnits + c.u;
    c.b = first_ + pass * kPassRows + c.row;
    c.valid = c.unit < r_.H && pass * kPassRows + c.row < rows_;
    return c;
  }

  // Calls f(cell, its state) for the thread's cells.
  template <class F>
  __device__ void for_each_cell(F&& f) {
    for (int pass = 0; pass < passes(); ++pass) {
      for (int group = 0; group < groups(); ++group) {
        const Cell c = cell(pass, group);
        if (c.valid) f(c, state(pass, group));
      }
    }
  }

  // What the thread keeps of its cell from step to step; no other thread touches it.
  __device__ Acc& state(int pass, int group) {
    return state_[(pass * plan_.groups + group) * kProductThreads + threadIdx.x];
  }

  // Steps of the longest row.
  __device__ int steps() const {
    int most = 0;
    for (int row = static_cast<int>(threadIdx.x); row < rows_; row += kProductThreads) {
      most = max(most, static_cast<int>(length_of(r_, first_ + row)));
    }
    return BlockGroup{}.reduce(most, 0, [](int a, int b) { return max(a, b); });
  }

  // ---------------------------------------------------------------- weights

  // The warp's chunks of the inner dimension: the first of group 0 into registers, the others into
  // slots. A lane reads back only what it wrote itself, so nothing has to be ordered.
  __device__ void load_weights(uint4 (&held)[kHeldChunks][4]) {
    const RecurrentWeight<T> w{static_cast<const T*>(r_.w_hh), static_cast<int>(r_.H), plan_.gates};
    const int first_group = unit_block_ * plan_.groups;
#pragma unroll
    for (int c = 0; c < kHeldChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        held[c][i] = c < chunks_ ? Product::weight(w, first_group, first_chunk_ + c, i, lane_)
                                 : make_uint4(0, 0, 0, 0);
      }
    }
    for (int group = 0; group < groups(); ++group) {
      for (int c = group == 0 ? kHeldChunks : 0; c < chunks_; ++c) {
        uint4* to = slot(group, c);
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          to[i * kWarp] = Product::weight(w, first_group + group, first_chunk_ + c, i, lane_);
        }
      }
    }
  }

  // ---------------------------------------------------------------- rounds

  // Fills the buffers of exchange, the first with value(b, unit) of the layer's inputs and zeros
  // elsewhere, clears the flags, and waits until all blocks have done so.
  template <class F>
  __device__ void start(F&& value) {
    const int threads = plan_.unit_blocks * kProductThreads;
    const int thread = unit_block_ * kProductThreads + static_cast<int>(threadIdx.x);
    const int64_t elements = static_cast<int64_t>(plan_.rows) * plan_.row_elements;
    for (int64_t n = thread; n < elements; n += threads) {
      const int row = static_cast<int>(n / plan_.row_elements);
      const int k = static_cast<int>(n % plan_.row_elements);
      store1(own_rows_ + n, row < rows_ && k < r_.H ? value(first_ + row, k) : Acc(0));
      store1(own_rows_ + buffer_elements_ + n, Acc(0));
    }
    for (int n = thread; n < plan_.passes * plan_.unit_blocks; n += threads) flags_[n] = 0;
    // Orders all of that before any block's first round.
    cooperative_groups::this_grid().sync();
  }

  // The warp waits until every block whose units it reads has exchanged round - 1 of the pass.
  __device__ void wait(int pass, int round) {
    if (round == 0) return;  // start() has ordered it
    const int per_block = plan_.groups * kUnits;
    const int first_unit = first_chunk_ * Product::kChunkUnits;
    const int end = min((first_chunk_ + chunks_) * Product::kChunkUnits, static_cast<int>(r_.H));
    uint32_t* flags = flags_ + pass * plan_.unit_blocks;
    for (int block = first_unit / per_block + lane_; block * per_block < end; block += kWarp) {
      while (load_acquire(flags + block) < static_cast<uint32_t>(round)) __nanosleep(20);
    }
    // Orders what the lanes acquired before the copies of all lanes.
    __syncwarp();
  }

  // The warp's part of the group's product with what was exchanged before `round`; total() has the
  // sum after a barrier of the block.
  __device__ void multiply(const uint4 (&held)[kHeldChunks][4], int pass, int group, int round) {
    if (chunks_ <= 0) return;  // its partials are not read either
    const int rows = pass_rows(pass);
    const T* x = own_rows_ + round % 2 * buffer_elements_ +
                 static_cast<int64_t>(pass) * kPassRows * plan_.row_elements;
    if constexpr (Product::kMostTiles == 1) {
      multiply_tiles<1>(held, x, group, rows);
    } else {
      static_assert(kPassRows == 4 * kTileRows && Product::kMostTiles == 4);
      if (rows > 2 * kTileRows) {
        multiply_tiles<4>(held, x, group, rows);
      } else if (rows > kTileRows) {
        multiply_tiles<2>(held, x, group, rows);
      } else {
        multiply_tiles<1>(held, x, group, rows);
      }
    }
  }

  template <class... Gates>
  __device__ auto total(const Cell& c, Gates&... gates) const {
    return Product::total(partials_, warps_, c.row, c.u, gates...);
  }

  // Value q of the cell, for the others to read in the next round.
  __device__ void exchange(const Cell& c, int pass, int q, Acc value, int round) {
    T* row = own_rows_ + (round + 1) % 2 * buffer_elements_ +
             (static_cast<int64_t>(pass) * kPassRows + c.row) * plan_.row_elements;
    store1(row + Product::position(c.unit, q), value);
  }

  // After a barrier that follows all of the block's exchanges of the pass in this round.
  __device__ void publish(int pass, int round) {
    if (threadIdx.x == 0) {
      store_release(flags_ + pass * plan_.unit_blocks + unit_block_,
                    static_cast<uint32_t>(round) + 1);
    }
  }

 private:
  // The product for `rows` rows from x on, kTiles tiles of them at a time. Of 4 there may be one
  // less: then the last one is brought twice, and nobody reads the sums of the second.
  template <int kTiles>
  __device__ __forceinline__ void multiply_tiles(const uint4 (&held)[kHeldChunks][4], const T* x,
                                                 int group, int rows) {
    constexpr int kParts = Product::kParts;
    constexpr int kTaken = kStagePieces / kTiles;                   // parts of a stage
    constexpr int kChunks = kTaken < kParts ? 1 : kTaken / kParts;  // whose products begin with it
    constexpr int kStages = Product::kStages;
    constexpr int kPartBytes = 64;
    constexpr bool kOnce = Product::kMostTiles > 1;  // all rows
    static_assert(kHeldChunks % kChunks == 0);
    const int parts = chunks_ * kParts;
    const int row_bytes = plan_.row_elements * static_cast<int>(sizeof(T));
    const int last_tile = kOnce ? (rows - kTileRows) * row_bytes : 0;
    const char* from = reinterpret_cast<const char*>(x) + lane_ / 4 * row_bytes +
                       first_chunk_ * kParts * kPartBytes + lane_ % 4 * 16;
    // The parts, tiles by tiles, go through the stages in turn; what comes next is brought while
    // those before it are used.
    int bring_row = 0, bring_part = 0, bring_to = 0;
    const auto bring = [&] {
      if (kOnce ? bring_part < parts : bring_row < rows) {
        uint4* to = stages_ + bring_to * kStagePieces * kWarp;
#pragma unroll
        for (int n = 0; n < kStagePieces; ++n) {
          const int part = n / kTiles, tile = n % kTiles;
          // Zeros beyond the warp's parts: nobody uses them, but they are read with the others.
          const bool inside = kTaken <= kParts || part == 0 || bring_part + part < parts;
          cp_async<16>(to + n * kWarp + Product::place(lane_, part),
                       from + part * kPartBytes +
                           (tile == kTiles - 1 ? last_tile : tile * kTileRows * row_bytes),
                       inside ? 16 : 0);
        }
        bring_to = bring_to + 1 == kStages ? 0 : bring_to + 1;
        bring_part += kTaken;
        from += kTaken * kPartBytes;
        if (!kOnce && bring_part >= parts) {
          from += kTileRows * row_bytes - bring_part * kPartBytes;
          bring_row += kTileRows;
          bring_part = 0;
        }
      }
      cp_async_commit();  // empty ones too: the waits count groups
    };
    // Orders the last reads of the stages in the previous product before these copies.
    if constexpr (!Product::kOwnPieces) __syncwarp();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) bring();

    int take_from = 0;
    typename Product::Taken taken;
    const auto take = [&] {
      cp_async_wait<kStages - 2>();
      // Orders the lanes' copies before the reads, and the reads of the stage before this one
      // before its next copy.
      if constexpr (!Product::kOwnPieces) __syncwarp();
      Product::take(taken, stages_ + take_from * kStagePieces * kWarp, lane_);
      take_from = take_from + 1 == kStages ? 0 : take_from + 1;
      bring();
    };

    typename Product::template Sums<kTiles> sums;
    // Chunks c to c + kChunks - 1, weights(i) being those of c + i until used(i).
    const auto add = [&](int c, auto&& weights, auto&& used) {
      if constexpr (kTaken < kParts) {
        const uint4(&w)[4] = weights(std::integral_constant<int, 0>{});
        static_for<kParts / kTaken>([&]<int n>(std::integral_constant<int, n>) {
          take();
          Product::template multiply<0, n * kTaken>(sums, w, taken, lane_);
        });
        used(0);
      } else {
        take();
        static_for<kChunks>([&]<int i>(std::integral_constant<int, i> chunk) {
          if (i == 0 || c + i < chunks_) {
            Product::template multiply<i * kParts * kTiles, 0>(sums, weights(chunk), taken, lane_);
            used(i);
          }
        });
      }
    };
    const auto add_chunks = [&] {
      // The next chunk that is not held: its weights are under way while the warp waits for a
      // stage, where there are registers for that.
      constexpr bool kAhead = sizeof(Acc) < 8;
      uint4 next[4];
      const int first_slot = group == 0 ? kHeldChunks : 0;
      if (kAhead && first_slot < chunks_) load_slot(next, group, first_slot);
      if (group == 0) {
        static_for<kHeldChunks / kChunks>([&]<int n>(std::integral_constant<int, n>) {
          constexpr int c = n * kChunks;
          const auto weights = [&]<int i>(std::integral_constant<int, i>) -> const uint4(&)[4] {
            return held[c + i];
          };
          if (c < chunks_) add(c, weights, [](int) {});
        });
      }
#pragma unroll 1
      for (int c = first_slot; c < chunks_; c += kChunks) {
        const auto weights = [&]<int i>(std::integral_constant<int, i>) -> const uint4(&)[4] {
          if (!kAhead) load_slot(next, group, c + i);
          return next;
        };
        add(c, weights, [&](int i) {
          if (kAhead && c + i + 1 < chunks_) load_slot(next, group, c + i + 1);
        });
      }
    };
    Acc* partials = partials_ + warp_ * Product::kPartials;
    int first = 0;
#pragma unroll 1
    do {
      sums = {};
      add_chunks();
      Product::store(sums, partials, first, lane_);
      first += kTileRows;
    } while (!kOnce && first < rows);
  }

  __device__ __forceinline__ void load_slot(uint4 (&w)[4], int group, int c) {
    const uint4* from = slot(group, c);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = from[i * kWarp];
  }

  __device__ uint4* slot(int group, int c) {
    const int n = group * plan_.chunks + c - min(plan_.chunks, kHeldChunks);
    uint4* base =
        n < plan_.shared_slots
            ? shared_slots_ + n * (kSlotBytes / 16)
            : other_slots_ + static_cast<int64_t>(n - plan_.shared_slots) * (kSlotBytes / 16);
    return base + warp_ * 4 * kWarp + lane_;
  }

  const ResidentPlan& plan_;
  const RecurrentInputs& r_;
  int unit_block_, warp_, lane_;
  int64_t first_;  // the batch group's first row
  int rows_;       // and how many
  int first_chunk_, chunks_;
  int warps_;            // that have chunks
  Acc* partials_;        // [kProductWarps, Product::kPartials]
  Acc* state_;           // [passes, groups, kProductThreads]
  uint4* stages_;        // [kStages, kStagePieces, 32], of the warp
  uint4* shared_slots_;  // [shared_slots, kProductWarps, 4, 32]
  uint4* other_slots_;   // [slots - shared_slots, kProductWarps, 4, 32]
  T* own_rows_;          // [2 (buffer_elements_ apart), rows, row_elements]
  int64_t buffer_elements_;
  uint32_t* flags_;  // [passes, unit_blocks]
};

}  // namespace seqkern::cuda
