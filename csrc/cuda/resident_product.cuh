// The product of one group of 8 hidden units with a pass of up to 32 batch rows, by one warp over
// its part of the inner dimension, in chunks whose weights are 64 bytes of each lane.
//
// Forward, the four gates of the 8 units: [32, H] times h_{t-1}. Backward, the gradient of h of the
// 8 units: W^T [8, 4 H] times dgates_t. The other operand is a row per batch row in the exchange
// (resident.cuh), padded with zeros to whole chunks: of a chunk it has one part of 64 bytes forward
// and four backward. A tile of 8 rows of a part is one piece of 16 bytes per lane; four such make a
// stage, which is brought before it is used (resident_pieces.cuh). What is summed for a row depends
// neither on the other rows nor on how many there are, nor does the order.
//
//   kChunkUnits   hidden units along the inner dimension of a chunk
//   kInputs       exchanged values of each: h, or the four dgates
//   kParts        of a chunk
//   kMostTiles    of 8 rows that a lane has sums of at once
//   kHeldChunks   in a lane's registers, the first of a block's chunks
//   kStages       places for stages, per warp: all but one are under way while one is used
//   kOwnPieces    a lane uses of them only what it brought itself
//   kPartials     accumulators a warp leaves in shared memory
//   position(unit)         of a unit's first exchanged value in its row, kApart before the next
//   place(lane, part)      in a tile of a stage, of the piece that the lane brings of a part
//   weight(...)            16 of a lane's 64 bytes of a chunk, from W
//   Sums<kTiles>           the lane's, for so many tiles
//   take(...)              the lane's view of a stage
//   multiply<kFirst, kPart>(...)   adds to the sums what the stage has of a chunk, from its piece
//                          kFirst and the chunk's part kPart on
//   store(...)             the lane's sums of the rows from `first` on to the warp's partials
//   total(...)             of one unit and row over the warps' partials, in the order of the warps
#pragma once

#include "cuda/resident_fma.cuh"
#include "cuda/resident_mma.cuh"

namespace seqkern::cuda {

template <class T>
using ForwardProduct = std::conditional_t<sizeof(T) == 2, MmaForward<T>, FmaForward<T>>;
template <class T>
using BackwardProduct = std::conditional_t<sizeof(T) == 2, MmaBackward<T>, FmaBackward<T>>;

}  // namespace seqkern::cuda
