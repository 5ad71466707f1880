// A kernel that stays on the device for a whole sequence, its recurrent weights in registers and
// shared memory: what a block of it holds, and how blocks hand each other the states.
//
// A batch group of blocks owns some batch rows; its blocks share the hidden units. In round n every
// block reads what all of them exchanged in round n - 1 and exchanges its own units' values, in the
// other one of two buffers. Rows go through in passes, each waited for by itself.
//
// How a block knows that values are there, and what orders what, is in resident_exchange.cuh. In
// either way a launch needs nothing of what the workspace held: start() fills it, and a barrier of
// the grid orders that before the first round.
#pragma once

#include <cooperative_groups.h>

#include "cuda/resident_exchange.cuh"
#include "cuda/resident_warp.cuh"

namespace seqkern::cuda {

// A unit of a batch row: a thread has one in each pass and set of groups.
struct Cell {
  int place;  // of its sums: WarpProduct::total
  int row;    // of the pass
  int u;      // of the group
  int unit;   // of the layer
  int64_t b;
  int64_t L;  // steps of its row; where there is no such cell, none
  bool valid;
};

// kOne: for plans of one pass and one set (ResidentPlan::is_one), so that a thread has one cell in
// all steps. What follows from that alone is computed once, and kept in registers.
template <class Product, class Exchange = ByFlags, bool kOne = false>
class Resident {
 public:
  using T = typename Product::Element;
  using Acc = typename Product::Acc;
  using Held = typename WarpProduct<Product, Exchange>::Held;

  __device__ Resident(const ResidentPlan& plan, const RecurrentInputs& r, void* workspace,
                      int64_t first_row)
      : plan_(plan), r_(r), product_(plan, static_cast<int>(r.H), workspace) {
    const int batch_group = static_cast<int>(blockIdx.x) / plan.unit_blocks;
    unit_block_ = static_cast<int>(blockIdx.x) % plan.unit_blocks;
    first_ = first_row + static_cast<int64_t>(batch_group) * plan.rows;
    const int64_t rows = r.B - first_;
    rows_ = static_cast<int>(rows < 0 ? 0 : rows < plan.rows ? rows : int64_t{plan.rows});
    first_block_ = product_.first_unit() / (plan.groups * kUnits);
    char* base = static_cast<char*>(workspace);
    own_rows_ = reinterpret_cast<T*>(base) +
                static_cast<int64_t>(batch_group) * plan.rows * plan.row_elements;
    flags_ = reinterpret_cast<uint32_t*>(base + plan.flags_at) +
             static_cast<int64_t>(batch_group) * plan.passes * plan.unit_blocks;
    if constexpr (kOne) {
      one_ = cell_of(0, 0);
      one_rows_ = opaque(pass_rows_of(0));
      one_buffer_ = opaque(buffer_elements());
      one_source_ = opaque(product_.source(own_rows_));
      one_place_ = opaque(place_of(one_, 0));
      flags_ = opaque(flags_);
      one_flag_ = opaque(flag_of(0));
    }
  }

  // ---------------------------------------------------------------- extent

  // Opaque: or what each step compares with takes a register through all of them.
  __device__ int passes() const {
    return kOne ? 1 : (opaque(rows_) + plan_.pass_rows - 1) >> plan_.pass_shift();
  }
  __device__ int sets() const { return kOne ? 1 : plan_.sets(); }

  // Rows of the pass, rounded up to tiles.
  __device__ int pass_rows(int pass) const { return kOne ? one_rows_ : pass_rows_of(pass); }

  __device__ Cell cell(int pass, int set) const {
    if constexpr (kOne) {
      return one_;
    } else {
      return cell_of(pass, set);
    }
  }

  // Calls f(cell, its state) for the thread's cells.
  template <class F>
  __device__ void for_each_cell(F&& f) {
    for (int pass = 0; pass < passes(); ++pass) {
      for (int set = 0; set < sets(); ++set) {
        const Cell c = cell(pass, set);
        if (c.valid) f(c, state(pass, set));
      }
    }
  }

  // What the thread keeps of its cell from step to step; no other thread touches it.
  __device__ Acc& state(int pass, int set) {
    if constexpr (kOne) {
      return one_state_;
    } else {
      return product_.state()[(pass * sets() + set) * kProductThreads + threadIdx.x];
    }
  }

  // Steps of the longest row.
  __device__ int steps() const {
    int most = 0;
    for (int row = static_cast<int>(threadIdx.x); row < rows_; row += kProductThreads) {
      most = max(most, static_cast<int>(length_of(r_, first_ + row)));
    }
    return BlockGroup{}.reduce(most, 0, [](int a, int b) { return max(a, b); });
  }

  __device__ void load_weights(Held& held) {
    product_.load_weights({static_cast<const T*>(r_.w_hh), static_cast<int>(r_.H), plan_.gates},
                          unit_block_ * plan_.groups, held);
  }

  // ---------------------------------------------------------------- rounds

  // Fills the buffers of exchange, that of round 0 with value(b, unit) of the layer's inputs and
  // zeros elsewhere, clears the flags, and waits until all blocks have done so.
  template <class F>
  __device__ void start(F&& value) {
    const int threads = plan_.unit_blocks * kProductThreads;
    const int thread = unit_block_ * kProductThreads + static_cast<int>(threadIdx.x);
    const int64_t elements = static_cast<int64_t>(plan_.rows) * plan_.row_elements;
    for (int64_t n = thread; n < elements; n += threads) {
      const int row = static_cast<int>(n / plan_.row_elements);
      const int k = static_cast<int>(n % plan_.row_elements);
      const Acc first = row < rows_ && k < r_.H ? value(first_ + row, k) : Acc(0);
#pragma unroll
      for (int i = 0; i < Exchange::kBuffers; ++i) {
        store1(own_rows_ + i * buffer_elements() + n, i == Exchange::buffer(0) ? first : Acc(0));
      }
    }
    if constexpr (!Exchange::kValues) {
      for (int n = thread; n < plan_.passes * plan_.unit_blocks; n += threads) flags_[n] = 0;
    }
    // Orders all of that before any block's first round.
    cooperative_groups::this_grid().sync();
  }

  // The warp's part of the set's product with what was exchanged before `round`, for which it waits
  // in the first set; total() has the sum after a barrier of the block.
  __device__ void multiply(const Held& held, int pass, int set, int round) {
    const char* from;
    if constexpr (kOne) {
      // Opaque, to be there before the wait: nothing should delay the copies after it.
      from = opaque(one_source_ + buffer_of(round) * static_cast<int64_t>(sizeof(T)));
    } else {
      from = product_.source(row_of(pass, 0) + buffer_of(round));
    }
    if (set == 0) wait(pass, round);
    product_.multiply(held, from, Exchange::expected(round, set), set, pass_rows(pass));
  }

  template <class... Gates>
  __device__ auto total(const Cell& c, Gates&... gates) const {
    return product_.template total<kOne>(c.place, c.u, gates...);
  }

  // The cell's values, for the others to read in the next round. Where the places of all gates are
  // side by side, they are one store: rows and units begin at multiples of 8 bytes, and what a cell
  // with fewer gates leaves is zero.
  template <int n>
  __device__ void exchange(const Cell& c, int pass, const Acc (&values)[n], int round) {
    T* const to = (kOne ? one_place_ : place_of(c, pass)) + buffer_of(round + 1);
    if constexpr (sizeof(T) == 2 && n > 1 && Product::kApart == 1) {
      Acc all[kGates] = {};
#pragma unroll
      for (int q = 0; q < n; ++q) all[q] = values[q];
      *reinterpret_cast<uint2*>(to) =
          make_uint2(pack2(TypeTag<T>{}, all[0], all[1]), pack2(TypeTag<T>{}, all[2], all[3]));
    } else {
#pragma unroll
      for (int q = 0; q < n; ++q) store1(to + q * Product::kApart, values[q]);
    }
  }

  // Where others read the cell's h in the next round, if values say themselves that they are there;
  // null where nobody does.
  __device__ T* h_place(const Cell& c, int pass, int round) const {
    if constexpr (!Exchange::kValues) return nullptr;
    T* const first = kOne ? one_place_ : place_of(c, pass);
    return first ? first + buffer_of(round + 1) : nullptr;
  }

  // exchange() of h, by all threads: `active` where the cell has a step, else h is zero. `nan` says
  // whether h is one: that is known earlier than h, and the warp has to know.
  __device__ void exchange_h(const Cell& c, int pass, T* place, bool active, Acc h, bool nan,
                             int round) {
    if constexpr (Exchange::kValues) {
      T stored;
      store1(&stored, h);
      const uint16_t bits = Exchange::mark(stored.bits, nan, round + 1);
      if (place) store_relaxed(&place->bits, bits);
    } else if (active) {
      exchange(c, pass, {h}, round);
    }
  }

  // After a barrier that follows all of the block's exchanges of the pass in this round. By the
  // warp that is the last to get cells: a release waits for what the block has stored.
  __device__ void publish(int pass, int round) {
    if (!Exchange::kValues && threadIdx.x == kProductThreads - kWarp) {
      store_release(kOne ? one_flag_ : flag_of(pass), static_cast<uint32_t>(round) + 1);
    }
  }

 private:
  // The warp waits until every block whose units it reads has exchanged round - 1 of the pass.
  // Values are waited for where they are read.
  __device__ void wait(int pass, int round) {
    if (Exchange::kValues || round == 0) return;  // start() has ordered round 0
    const int per_block = plan_.groups * kUnits;
    const int first = first_block_ + static_cast<int>(threadIdx.x) % kWarp;
    const int end = min(product_.end_unit(), static_cast<int>(r_.H));
    uint32_t* flags = flags_ + pass * plan_.unit_blocks;
    for (int block = first; block * per_block < end; block += kWarp) {
      for (uint32_t polls = 0; load_acquire(flags + block) < static_cast<uint32_t>(round);) {
        between_polls(++polls);
      }
    }
    // Orders what the lanes acquired before the copies of all lanes.
    __syncwarp();
  }

  // Neighbouring threads have neighbouring units, of one group after the other; the first rows are
  // those of the first warps, so that few rows are on as many schedulers as there are.
  __device__ Cell cell_of(int pass, int set) const {
    Cell c;
    const int n = static_cast<int>(threadIdx.x) / kUnits;
    const int in_set = n & (plan_.span - 1);
    c.row = n >> (plan_.span - 1);
    c.place = in_set * plan_.pass_rows + c.row;
    c.u = static_cast<int>(threadIdx.x) % kUnits;
    const int group = set * plan_.span + in_set;
    c.unit = (unit_block_ * plan_.groups + group) * kUnits + c.u;
    c.b = first_ + pass * plan_.pass_rows + c.row;
    c.valid = c.unit < r_.H && pass * plan_.pass_rows + c.row < rows_;
    c.L = c.valid ? length_of(r_, c.b) : 0;
    return c;
  }

  __device__ int pass_rows_of(int pass) const {
    const int rest = rows_ - pass * plan_.pass_rows;
    return min(plan_.pass_rows, (rest + kTileRows - 1) / kTileRows * kTileRows);
  }

  // The cell's first value in the first buffer; by values, null where nobody reads it.
  __device__ T* place_of(const Cell& c, int pass) const {
    if constexpr (Exchange::kValues) {
      const int units = (static_cast<int>(r_.H) + kUnits - 1) / kUnits * kUnits;
      if (c.row >= pass_rows(pass) || c.unit >= units) return nullptr;
    }
    return row_of(pass, c.row) + Product::position(c.unit);
  }

  // The block's own.
  __device__ uint32_t* flag_of(int pass) const {
    return flags_ + pass * plan_.unit_blocks + unit_block_;
  }

  __device__ int64_t buffer_elements() const { return plan_.launch_rows() * plan_.row_elements; }
  // From the first buffer to that which is read in the round.
  __device__ int64_t buffer_of(int round) const {
    return Exchange::buffer(round) * (kOne ? one_buffer_ : buffer_elements());
  }
  // Of the pass, in the first buffer.
  __device__ T* row_of(int pass, int row) const {
    return own_rows_ + (static_cast<int64_t>(pass) * plan_.pass_rows + row) * plan_.row_elements;
  }

  const ResidentPlan& plan_;
  const RecurrentInputs& r_;
  WarpProduct<Product, Exchange> product_;
  int unit_block_;
  int first_block_;  // which has the first unit that the warp reads
  int64_t first_;    // the batch group's first row
  int rows_;         // and how many
  T* own_rows_;      // [kBuffers (buffer_elements() apart), rows, row_elements]
  uint32_t* flags_;  // [passes, unit_blocks]
  // With kOne, of the only pass and cell.
  Cell one_;
  Acc one_state_;
  int one_rows_;            // pass_rows()
  int64_t one_buffer_;      // buffer_elements()
  const char* one_source_;  // WarpProduct::source() of own_rows_
  T* one_place_;            // place_of()
  uint32_t* one_flag_;      // flag_of()
};

}  // namespace seqkern::cuda
