// A warp's part of its block's products: its chunks of the inner dimension and their weights.
#pragma once

#include <utility>

#include "cuda/recurrent.cuh"
#include "cuda/resident_pieces.cuh"
#include "cuda/resident_product.cuh"

namespace seqkern::cuda {

// Calls f(std::integral_constant<int, i>) for i from 0 to n - 1.
template <int n, class F>
__device__ __forceinline__ void static_for(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

template <class Product, class Exchange>
class WarpProduct {
 public:
  using T = typename Product::Element;
  using Acc = typename Product::Acc;
  using Held = uint4[Product::kHeldChunks][4];
  using Expected = typename Exchange::Expected;

  // For H units.
  __device__ WarpProduct(const ResidentPlan& plan, int H, void* workspace)
      : plan_(plan),
        H_(H),
        warp_(static_cast<int>(threadIdx.x) / kWarp),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        workspace_(static_cast<char*>(workspace)) {
    const int all_chunks = plan.inner_units / Product::kChunkUnits;
    first_chunk_ = min(warp_ * plan.chunks, all_chunks);
    chunks_ = min(plan.chunks, all_chunks - first_chunk_);
    partials_ = dynamic_shared<Acc>();
    uint4* stages = reinterpret_cast<uint4*>(state() + plan.states() * kProductThreads);
    stages_ = stages + warp_ * Product::kStages * kStagePieces * kWarp;
    shared_slots_ = stages + kProductWarps * Product::kStages * kStagePieces * kWarp;
    // A warp without chunks never writes its partials, which are summed with the others.
    if (chunks_ <= 0) {
      for (int n = lane_; n < Product::kPartials; n += kWarp) {
        partials_[warp_ * Product::kPartials + n] = 0;
      }
    }
  }

  // [ResidentPlan::states(), kProductThreads], which the products leave alone.
  __device__ Acc* state() const { return partials_ + kProductWarps * Product::kPartials; }

  // Of the layer, whose exchanged values the warp reads: none where the second is not above the
  // first.
  __device__ int first_unit() const { return first_chunk_ * Product::kChunkUnits; }
  __device__ int end_unit() const { return (first_chunk_ + chunks_) * Product::kChunkUnits; }

  // The weights of the block's groups from first_group on: the first chunks of the first set into
  // registers, the others into slots. A lane reads back only what it wrote itself, so nothing has
  // to be ordered.
  __device__ void load_weights(const RecurrentWeight<T>& w, int first_group, Held& held) {
    const int of_group = Product::kHeldChunks / plan_.span;
#pragma unroll
    for (int n = 0; n < Product::kHeldChunks; ++n) {
      const int group = n / of_group, c = n % of_group;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        held[n][i] = c < chunks_
                         ? Product::weight(w, first_group + group, first_chunk_ + c, i, lane_)
                         : make_uint4(0, 0, 0, 0);
      }
    }
    for (int group = 0; group < plan_.groups; ++group) {
      for (int c = group < plan_.span ? of_group : 0; c < chunks_; ++c) {
        uint4* to = slot(slot_number(group, c));
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          to[i * kWarp] = Product::weight(w, first_group + group, first_chunk_ + c, i, lane_);
        }
      }
    }
  }

  // Where the lane's first piece of the exchanged rows from x on is. Opaque, as in
  // multiply_tiles().
  __device__ const char* source(const T* x) const {
    const int lane = opaque(lane_);
    return reinterpret_cast<const char*>(x) + lane / 4 * opaque(row_bytes()) +
           first_chunk_ * Product::kParts * kPartBytes + lane % 4 * 16;
  }

  // The warp's part of the set's product with `rows` exchanged rows (whole tiles), of which `from`
  // is source(), as they are expected; total() has the sum after a barrier of the block.
  __device__ void multiply(const Held& held, const char* from, const Expected& expected, int set,
                           int rows) {
    if (chunks_ <= 0) return;
    if constexpr (Product::kMostTiles == 1) {
      multiply_tiles<1, 1>(held, from, expected, set, rows);
    } else {
      static_assert(kPassRows == 4 * kTileRows && Product::kMostTiles == 4);
      if (plan_.span == 2) {
        if (rows > kTileRows) {
          multiply_tiles<2, 2>(held, from, expected, set, rows);
        } else {
          multiply_tiles<1, 2>(held, from, expected, set, rows);
        }
      } else if (rows > 2 * kTileRows) {
        multiply_tiles<4, 1>(held, from, expected, set, rows);
      } else if (rows > kTileRows) {
        multiply_tiles<2, 1>(held, from, expected, set, rows);
      } else {
        multiply_tiles<1, 1>(held, from, expected, set, rows);
      }
    }
  }

  // Of unit u of a group; place: group of the set * rows of a pass + row of the pass. kAtOnce: all
  // partials are read before they are added, for which not every kernel has registers.
  template <bool kAtOnce, class... Gates>
  __device__ auto total(int place, int u, Gates&... gates) const {
    return Product::template total<kAtOnce ? kProductWarps : 2>(partials_, place, u, gates...);
  }

 private:
  // The product of a set of kSpan groups for `rows` rows, kTiles tiles of them at a time.
  // Of 4 there may be one less: then the last one is brought twice, and nobody reads the sums of
  // the second.
  template <int kTiles, int kSpan>
  __device__ __forceinline__ void multiply_tiles(const Held& held, const char* from,
                                                 const Expected& expected, int set, int rows) {
    constexpr int kParts = Product::kParts;
    constexpr int kTaken = kStagePieces / kTiles;                   // parts of a stage
    constexpr int kChunks = kTaken < kParts ? 1 : kTaken / kParts;  // whose products begin with it
    constexpr bool kOnce = Product::kMostTiles > 1;                 // all rows
    // Opaque: their sums and products for every kTiles and kSpan would not fit in registers.
    const int lane = opaque(lane_);
    PieceSource source;
    source.from = from;
    source.row_bytes = opaque(row_bytes());
    source.rows = rows;
    source.last_tile = kOnce ? (rows - kTileRows) * source.row_bytes : 0;
    source.parts = chunks_ * kParts;
    source.lane = lane;
    source.stages = stages_;
    if constexpr (Exchange::kValues) {
      const int units = H_ - first_unit() - lane % 4 * kPack<T>;
      source.own_parts =
          min(source.parts, (units + Product::kChunkUnits - 1) / Product::kChunkUnits);
    }
    Pieces<Product, kTiles, Exchange> pieces(source, expected);
    typename Product::Taken taken;
    pieces.start(taken);
    const auto take = [&] { pieces.take(taken); };

    typename Product::template Sums<kTiles> sums[kSpan];
    // Chunks c to c + kChunks - 1. weights<i, g, kLast>(f) calls f with those of chunk c + i and
    // the set's group g, for the last time if so.
    const auto add = [&](int c, auto&& weights) {
      if constexpr (kTaken < kParts) {
        constexpr int kTurns = kParts / kTaken;
        static_for<kTurns>([&]<int n>(std::integral_constant<int, n>) {
          take();
          static_for<kSpan>([&]<int g>(std::integral_constant<int, g>) {
            weights.template operator()<0, g, n == kTurns - 1>([&](const uint4(&w)[4]) {
              Product::template multiply<0, n * kTaken>(sums[g], w, taken, lane);
            });
          });
        });
      } else {
        take();
        static_for<kChunks>([&]<int i>(std::integral_constant<int, i>) {
          if (i > 0 && c + i >= chunks_) return;
          static_for<kSpan>([&]<int g>(std::integral_constant<int, g>) {
            weights.template operator()<i, g, true>([&](const uint4(&w)[4]) {
              Product::template multiply<i * kParts * kTiles, 0>(sums[g], w, taken, lane);
            });
          });
        });
      }
    };
    const auto add_chunks = [&] {
      constexpr int kHeld = Product::kHeldChunks / kSpan;  // of each group
      constexpr int kHeldTurns = (kHeld + kChunks - 1) / kChunks;
      // The weights of the next chunk in a slot are under way while the warp waits for a stage.
      // There are no registers for those of several groups, which are all in shared memory.
      constexpr bool kAhead = kSpan == 1;
      uint4 next[4];
      const uint4* shared[kSpan] = {};
      const int first_slot = set == 0 ? kHeld : 0;
      if constexpr (kAhead) {
        if (first_slot < chunks_) load_slot(next, slot(slot_number(set, first_slot)));
      } else {
#pragma unroll
        for (int g = 0; g < kSpan; ++g) {
          shared[g] = shared_slot(opaque(slot_number(set * kSpan + g, 0)));
        }
      }
      const auto from_slots = [&]<int g, bool kLast>(int c, auto&& f) {
        if (!kAhead) load_slot(next, shared[g] + c * (kSlotBytes / 16));
        f(next);
        if (kAhead && kLast && c + 1 < chunks_) load_slot(next, slot(slot_number(set, c + 1)));
      };
      if (set == 0) {
        static_for<kHeldTurns>([&]<int n>(std::integral_constant<int, n>) {
          constexpr int c = n * kChunks;
          if (c >= chunks_) return;
          add(c, [&]<int i, int g, bool kLast>(auto&& f) {
            if constexpr (c + i < kHeld) {
              f(held[g * kHeld + c + i]);
            } else {
              from_slots.template operator()<g, kLast>(c + i, f);
            }
          });
        });
      }
#pragma unroll 1
      for (int c = set == 0 ? kHeldTurns * kChunks : 0; c < chunks_; c += kChunks) {
        add(c, [&]<int i, int g, bool kLast>(auto&& f) {
          from_slots.template operator()<g, kLast>(c + i, f);
        });
      }
    };
    Acc* partials = partials_ + warp_ * Product::kPartials;
    int first = 0;
#pragma unroll 1
    do {
#pragma unroll
      for (int g = 0; g < kSpan; ++g) sums[g] = {};
      add_chunks();
#pragma unroll
      for (int g = 0; g < kSpan; ++g) {
        Product::store(sums[g], partials, g * (kPassRows / kSpan) + first, lane);
      }
      first += kTileRows;
    } while (!kOnce && first < rows);
  }

  __device__ int row_bytes() const { return plan_.row_elements * static_cast<int>(sizeof(T)); }

  __device__ static __forceinline__ void load_slot(uint4 (&w)[4], const uint4* from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = from[i * kWarp];
  }
  // Of chunk c of a group; in the first set those that are not held follow each other.
  __device__ __forceinline__ int slot_number(int group, int c) const {
    const int held = min(plan_.chunks, Product::kHeldChunks >> (plan_.span - 1));  // of each group
    return group * plan_.chunks + c - min(group + 1, plan_.span) * held;
  }
  __device__ __forceinline__ uint4* shared_slot(int n) const {
    return shared_slots_ + (n * kProductWarps * 4 + warp_ * 4) * kWarp + lane_;
  }
  __device__ uint4* slot(int n) const {
    if (n < plan_.shared_slots) return shared_slot(n);
    const int64_t others = plan_.slots - plan_.shared_slots;
    uint4* slots = reinterpret_cast<uint4*>(workspace_ + plan_.slots_at);
    return slots +
           ((blockIdx.x * others + n - plan_.shared_slots) * kProductWarps + warp_) * 4 * kWarp +
           lane_;
  }

  const ResidentPlan& plan_;
  const int H_;
  const int warp_, lane_;
  char* const workspace_;  // [blocks, slots - shared_slots, kProductWarps, 4, 32] at slots_at
  int first_chunk_, chunks_;
  Acc* partials_;        // [kProductWarps, Product::kPartials]
  uint4* stages_;        // [kStages, kStagePieces, 32], of the warp
  uint4* shared_slots_;  // [shared_slots, kProductWarps, 4, 32]
};

}  // namespace seqkern::cuda
