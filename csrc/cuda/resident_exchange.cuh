// The two ways in which the blocks of a resident kernel (resident.cuh) know that what another block
// exchanges is there, and why both are in order. In round n every block reads what all blocks of
// its batch group exchanged in round n - 1: the values of round n, V_n. Buffers alternate, so
// V_{n+1} overwrites V_{n-1}. What is said here holds for each pass by itself, which has its own
// rows.
//
// By flags: a block counts in a flag of each pass the rounds it has exchanged.
//   X: threads store V_{n+1}; __syncthreads; a thread: store_release(flag of X, n + 1)
//   Y: a lane: load_acquire(flag of X) >= n + 1; __syncwarp; the warp's lanes copy values
// The release takes along what the barrier ordered before it, and the acquire goes on to the warp
// through __syncwarp, so each store happens before the copies are started (cp.async of 16 bytes,
// which reads L2 and leaves L1 alone). That X does not overwrite what Y still reads in round n:
//   Y: copies of V_n, waited for; __syncthreads (before its sums); store_release(flag of Y, n + 1)
//   X: each warp waits for n + 1 from the blocks whose units it reads, in round n + 1; the warps of
//      X together read all units; __syncthreads (before its sums); only then X's stores of V_{n+2}.
// Flags only grow within a launch, and begin at 0 in each: start() clears them, and a barrier of
// the grid orders that before any wait. That is four ways through L2 one after the other: the
// values and the answer the release waits for, the flag, its read, the copy.
//
// By values: no flags. |h| <= 1, so the highest bit of its exponent is free, and says in which of
// two uses of the buffer the value was stored; who reads an old one reads again. That is two ways:
// the values' to L2, and their read.
//   What is read is an element of V_n or of V_{n-2}, which differ in that bit. An element is one
//   store and has no parts, so nothing has to be ordered but the accesses to that one place, which
//   L2 does: a read that follows another there finds nothing older. (Some of the reads are copies,
//   which PTX does not promise this of: ptx.cuh, Copied.)
//   Round 0 reads h0, any number, from a buffer of its own. start() fills it, and the two others
//   with what V_1 and V_2 are not; the barrier of the grid is between.
//   NaN is all ones, so its bit tells nothing. Where one of the 8 values of a piece, a group's in a
//   row, is NaN, the first is stored as NaN and the others as 0, which have the bit. Whichever it
//   is, all of the row's products with V_n are NaN then, and its c and h from there on. In V_{n+2}
//   the old NaN may pass for a number (between 1 and 2) once the other seven are new. No harm: what
//   a block stored of that row itself is NaN, too, and it reads that new, after its own barrier.
//   What is waited for is stored: all rows of a tile and all units of a group are, in every round,
//   zeros where there is no such row or unit or no step any more. Groups beyond the layer's are
//   neither stored nor waited for.
// That X does not store V_{n+1} while Y still reads V_{n-1}:
//   Y: its reads of V_{n-1} have returned and were found new, in the product of its first set, or
//      have returned in those of the next sets; __syncthreads; only then Y stores its last set's
//      part of V_n
//   X: its warps together have read all of V_n, of all rows and units, and found it new;
//      __syncthreads; only then X stores V_{n+1}
// A read that has returned is over, and a store that waits for it comes later: no fence is needed.
// (Where a block has fewer groups than others, its last sets may have no units. They may read what
// is being overwritten; nothing is checked there and nobody uses their sums.)
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/ptx.cuh"

namespace seqkern::cuda {

struct NothingToCheck {};

struct ByFlags {
  static constexpr bool kValues = false;
  static constexpr int kBuffers = 2;
  using Expected = NothingToCheck;

  // From which values are read in a round.
  __device__ static __forceinline__ int buffer(int round) { return round % 2; }
  __device__ static __forceinline__ Expected expected(int, int) { return {}; }
};

// Of two 16-bit numbers in a word.
inline constexpr uint32_t kHighestExponentBits = 0x40004000u;
inline constexpr uint32_t kNanBits = 0x7fffu;

// What the values of a round look like to their readers.
struct ExpectedValues {
  uint32_t flips;    // bits in which they differ from the numbers they stand for
  uint32_t checked;  // bits that have to be right

  __device__ __forceinline__ uint32_t differences(uint4 x) const {
    return (x.x ^ flips) | (x.y ^ flips) | (x.z ^ flips) | (x.w ^ flips);
  }
  __device__ __forceinline__ bool is_stale(uint4 x) const {
    // A NaN, which can only be the first, is not waited for: the others say whether it is new.
    if (((x.x ^ flips) & kNanBits) == kNanBits) x.x = (x.x & 0xffff0000u) | (flips & 0xffffu);
    return (differences(x) & checked) != 0;
  }
  __device__ __forceinline__ uint4 value(uint4 x) const {
    return make_uint4(x.x ^ flips, x.y ^ flips, x.z ^ flips, x.w ^ flips);
  }
};

// Of 16-bit types, whose groups of 8 units are pieces of 16 bytes.
struct ByValues {
  static constexpr bool kValues = true;
  static constexpr int kBuffers = 3;
  using Expected = ExpectedValues;

  __device__ static __forceinline__ int buffer(int round) { return round == 0 ? 2 : round % 2; }
  // Values of rounds 1 and 2 have the bit set, so zeros are not theirs; then 3 and 4 have not.
  __device__ static __forceinline__ uint32_t flips(int round) {
    return ((round + 1) & 2) != 0 ? kHighestExponentBits : 0;
  }
  __device__ static __forceinline__ Expected expected(int round, int set) {
    // Later sets read what the first one has found to be new.
    return {round == 0 ? 0 : flips(round), round == 0 || set > 0 ? 0 : kHighestExponentBits};
  }
  // `bits` of a lane's value for the round, those of NaN stored as said above. By all lanes, of
  // which 8 neighbours have a piece.
  __device__ static __forceinline__ uint16_t mark(uint32_t bits, bool nan, int round) {
    const uint32_t lane = threadIdx.x % kWarp;
    if ((__ballot_sync(kAllLanes, nan) >> (lane & ~7u) & 0xffu) != 0) {
      bits = lane % 8 == 0 ? kNanBits : 0;
    }
    return static_cast<uint16_t>(bits ^ (flips(round) & 0xffffu));
  }
};

}  // namespace seqkern::cuda
