// How a warp gets the pieces of a product (resident_product.cuh) from the exchanged rows: through a
// ring of stages in shared memory, and, where values say themselves which round they are from
// (resident_exchange.cuh), with a check of each piece.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/resident_exchange.cuh"
#include "cuda/resident_operands.cuh"

namespace seqkern::cuda {

inline constexpr int kPartBytes = 64;

// What a lane reads for a product.
struct PieceSource {
  const char* from;  // its first piece: of the warp's first part, in the first tile
  int row_bytes;
  int rows;       // exchanged ones: whole tiles
  int last_tile;  // bytes from the first tile to the last, where there may be fewer than kTiles
  int parts;      // of the warp, of each row
  int own_parts;  // of which the lane has units, the first ones (set by values only)
  int lane;
  uint4* stages;  // [Product::kStages, kStagePieces, 32], of the warp

  // Of piece n of a stage, from the stage's first piece on.
  template <int kTiles>
  __device__ __forceinline__ int offset(int n) const {
    const int part = n / kTiles, tile = n % kTiles;
    const bool last = kTiles > 2 && tile == kTiles - 1;
    return part * kPartBytes + (last ? last_tile : tile * kTileRows * row_bytes);
  }
};

// The parts, tiles by tiles, go through the stages in turn; what comes next is brought while those
// before it are used.
template <class Product, int kTiles, Copied kCopied = Copied::kOrdered>
class PieceRing {
 public:
  using Taken = typename Product::Taken;
  static constexpr int kTaken = kStagePieces / kTiles;  // parts of a stage

  __device__ __forceinline__ PieceRing(const PieceSource& source, const NothingToCheck&)
      : source_(source), from_(source.from) {}

  __device__ __forceinline__ void start(Taken&) { begin(0); }

  // Brings from that part of the first tiles on.
  __device__ __forceinline__ void begin(int part) {
    // Orders the last reads of the stages in the previous product before these copies.
    if constexpr (!Product::kOwnPieces) __syncwarp();
    from_ = source_.from + part * kPartBytes;
    row_ = 0;
    part_ = part;
    to_ = take_from_ = 0;
#pragma unroll
    for (int i = 0; i < Product::kStages - 1; ++i) bring();
  }

  __device__ __forceinline__ void take(Taken& taken) {
    cp_async_wait<Product::kStages - 2>();
    // Orders the lanes' copies before the reads, and the reads of the stage before this one before
    // its next copy.
    if constexpr (!Product::kOwnPieces) __syncwarp();
    Product::take(taken, source_.stages + take_from_ * kStagePieces * kWarp, source_.lane);
    take_from_ = take_from_ + 1 == Product::kStages ? 0 : take_from_ + 1;
    bring();
  }

 private:
  __device__ __forceinline__ void bring() {
    constexpr bool kOnce = Product::kMostTiles > 1;  // all rows
    if (kOnce ? part_ < source_.parts : row_ < source_.rows) {
      uint4* to = source_.stages + to_ * kStagePieces * kWarp;
#pragma unroll
      for (int n = 0; n < kStagePieces; ++n) {
        const int part = n / kTiles;
        // Zeros beyond the warp's parts: nobody uses them, but they are read with the others.
        const bool inside = kTaken <= Product::kParts || part == 0 || part_ + part < source_.parts;
        cp_async<16, kCopied>(to + n * kWarp + Product::place(source_.lane, part),
                              from_ + source_.offset<kTiles>(n), inside ? 16 : 0);
      }
      to_ = to_ + 1 == Product::kStages ? 0 : to_ + 1;
      part_ += kTaken;
      from_ += kTaken * kPartBytes;
      if (!kOnce && part_ >= source_.parts) {
        from_ += kTileRows * source_.row_bytes - part_ * kPartBytes;
        row_ += kTileRows;
        part_ = 0;
      }
    }
    cp_async_commit();  // empty ones too: the waits count groups
  }

  const PieceSource& source_;
  const char* from_;  // of what is brought next
  int row_ = 0, part_ = 0, to_ = 0;
  int take_from_ = 0;
};

// The first stage goes straight to the lane's registers, by reads that are repeated until all of
// its values are there: what a block waits for in a step is on its way to it at once. The other
// stages come through the ring. Their copies are started beside the first reads, and once more
// where those were too early; each is checked like the first when it is taken. While a block waits,
// its lanes ask for one stage at most, and of it only for the pieces that were not there.
template <class Product, int kTiles>
class CheckedPieces {
 public:
  using Taken = typename Product::Taken;
  static constexpr int kTaken = kStagePieces / kTiles;
  static_assert(Product::kOwnPieces && Product::kParts == 1 && Product::kMostTiles > 1);

  __device__ __forceinline__ CheckedPieces(const PieceSource& source,
                                           const ExpectedValues& expected)
      : source_(source), expected_(expected), ring_(source, {}) {}

  __device__ __forceinline__ void start(Taken& taken) {
    part_ = 0;
    if (others()) ring_.begin(kTaken);
#pragma unroll
    for (int n = 0; n < kStagePieces; ++n) {
      taken[n] = own(n) ? load_relaxed(place(n)) : make_uint4(0, 0, 0, 0);
    }
    // For the compiler, which would have the last wait for what the first bring: nothing is
    // ordered.
    __syncwarp();
  }

  __device__ __forceinline__ void take(Taken& taken) {
    if (part_ > 0) ring_.take(taken);
    bool stale = false;
#pragma unroll
    for (int n = 0; n < kStagePieces; n += kTiles) {
      uint32_t bits = 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) bits |= expected_.differences(taken[n + tile]);
      stale |= own(n) && bits & expected_.checked;
    }
    if (__any_sync(kAllLanes, stale)) {
      if (wait(taken) && part_ == 0 && others()) {
        // What was brought of the next stages was as early. It is over before it is overwritten.
        cp_async_wait<0>();
        ring_.begin(kTaken);
      }
    }
#pragma unroll
    for (int n = 0; n < kStagePieces; ++n) taken[n] = expected_.value(taken[n]);
    part_ += kTaken;
  }

 private:
  // Whether there are stages after the first: a warp with few parts does without the ring.
  __device__ __forceinline__ bool others() const { return source_.parts > kTaken; }
  // Whether the lane uses piece n of the stage: beyond its units and the warp's parts nobody
  // writes.
  __device__ __forceinline__ bool own(int n) const {
    return part_ + n / kTiles < source_.own_parts;
  }
  __device__ __forceinline__ const char* place(int n) const {
    return source_.from + part_ * kPartBytes + source_.offset<kTiles>(n);
  }

  // Until all lanes have the stage's values; whether that took another read. A lane asks once more
  // for all that is missing, then for one piece as long as nothing comes: blocks that wait for long
  // leave L2 to those they wait for.
  __device__ __forceinline__ bool wait(Taken& taken) {
    uint32_t before = 0;
    for (uint32_t polls = 0;;) {
      uint32_t missing = 0;
#pragma unroll
      for (int n = 0; n < kStagePieces; ++n) {
        if (own(n) && expected_.is_stale(taken[n])) missing |= 1u << n;
      }
      if (!__any_sync(kAllLanes, missing != 0)) return polls > 0;
      const uint32_t asked = missing != before ? missing : missing & -missing;
      before = missing;
#pragma unroll
      for (int n = 0; n < kStagePieces; ++n) {
        if (asked >> n & 1) taken[n] = load_relaxed(place(n));
      }
      between_polls(++polls);
    }
  }

  const PieceSource& source_;
  const ExpectedValues expected_;
  PieceRing<Product, kTiles, Copied::kMeanwhile> ring_;
  int part_ = 0;  // of the stage that is taken next, its first
};

template <class Product, int kTiles, class Exchange>
using Pieces = std::conditional_t<Exchange::kValues, CheckedPieces<Product, kTiles>,
                                  PieceRing<Product, kTiles>>;

}  // namespace seqkern::cuda
