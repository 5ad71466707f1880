// How the logits of ops::linear_cross_entropy are cut into chunks and tiles.
#include "torch/linear_cross_entropy.h"

namespace seqkern::linear_cross_entropy_parts {
namespace {

constexpr int64_t kMiB = 1 << 20;
// CPU. A GEMM reads and writes all of dW for a chunk, so a chunk has hundreds of rows where memory
// allows; a small vocabulary's chunk fills the cache instead. Measured in
// docs/math/linear_cross_entropy.md.
constexpr int64_t kFewestRows = 64;
constexpr int64_t kMostRows = 512;
// With 16-bit operands a GEMM takes less time than the packing of a weight for few rows, or than
// adding to a dW in memory. So up to these are one chunk, and up to kMostRows if their logits are
// few (where vector units multiply, twice as many: a matrix unit loses more time to a result that
// leaves second-level cache); and where chunks would have fewer rows than these, they have more of
// them, and logits are made twice instead of kept.
constexpr int64_t kFewestMixedRows = 256;
// A matrix unit makes logits a second time in less time than more of them than these take to memory
// and back, and sums of dW with them.
constexpr int64_t kMostKeptLogits = 16 * kMiB;
// The gradient of hidden sums over a tile's columns in a GEMM, whose error grows with their number,
// and then over the tiles.
constexpr int64_t kWidestTile = 4096;
constexpr int64_t kSmallChunk = 2 * kMiB;
constexpr int64_t kLargestChunk = 128 * kMiB;
constexpr int64_t kTile = kMiB;
// Not a multiple of 1024: rows a power of two apart fall on the same few cache lines.
constexpr int64_t kNarrowestTile = 1600;
// Products of 16-bit operands take so little time that the threads' meetings, some for each tile,
// count.
constexpr int64_t kMixedTile = 4000;
// Where a tile's part of dW is finished with the tile: half as wide, as more of it stays in cache.
constexpr int64_t kFinishedTile = 2000;
// CUDA: large GEMMs.
constexpr int64_t kCudaChunk = 128 * kMiB;
// Products of 16-bit operands: rows of a chunk below which adding its part to dW (16 bytes of
// traffic per element, each as long as some 180 operations of tensor cores) costs more than making
// the logits twice (2 operations per element and row). Then all rows walk through the vocabulary.
constexpr int64_t kFewestCudaRows = 1400;
constexpr int64_t kNarrowestCudaTile = 1024;
// Rows of a 16-bit matrix must begin on 16 bytes, or a GEMM falls back to slow loads.
constexpr int64_t kAlignedColumns = 8;

// Where GEMMs take 16-bit operands: columns of tiles that begin on 16 bytes, close to `wanted`.
// What is left of an uneven vocabulary is one more tile, a narrow one.
int64_t aligned_width(int64_t V, int64_t wanted) {
  const int64_t tiles = (V + wanted - 1) / wanted;
  const int64_t width = std::max<int64_t>(V / tiles / kAlignedColumns, 1) * kAlignedColumns;
  return std::min(width, V);
}

Plan make_device_plan(const Head& head, bool all_tiles, int64_t chunk_bytes) {
  const int64_t R = std::max<int64_t>(1, head.R());
  const int64_t V = head.V();
  const int64_t bytes = chunk_bytes ? chunk_bytes : kCudaChunk;
  const int64_t item = item_size(head.acc) + (head.mixed() ? 2 : 0);
  int64_t rows = std::clamp<int64_t>(bytes / (V * item), 1, R);
  if (head.mixed() && rows < std::min(R, kFewestCudaRows)) {
    const int64_t narrowest = chunk_bytes ? kAlignedColumns : kNarrowestCudaTile;
    const int64_t width = std::clamp(bytes / (R * item), narrowest, std::max(V, narrowest));
    return {.rows = R, .width = aligned_width(V, width), .all_tiles = false};
  }
  const int64_t chunks = (R + rows - 1) / rows;
  rows = (R + chunks - 1) / chunks;  // the last one as large as the others
  return {.rows = rows, .width = head.mixed() ? aligned_width(V, V) : V, .all_tiles = all_tiles};
}

Plan make_host_plan(const Head& head, bool all_tiles, int64_t chunk_bytes) {
  const int64_t item = item_size(head.acc);
  const int64_t R = std::max<int64_t>(1, head.R());
  const int64_t V = head.V();
  const bool gradients = all_tiles;
  const int64_t row_bytes = (all_tiles ? V : std::min(V, kNarrowestTile)) * item;
  const bool in_vectors = head.mixed() && !Backend::matrix_unit();
  const bool several = all_tiles && !in_vectors;
  const int64_t share = head.mixed() ? R / 4 : R / 2;
  const int64_t wanted = std::max(several ? std::clamp(share, kFewestRows, kMostRows) : kMostRows,
                                  kSmallChunk / row_bytes);
  int64_t rows = std::min(wanted, (chunk_bytes ? chunk_bytes : kLargestChunk) / row_bytes);
  if (all_tiles && chunk_bytes) rows = chunk_bytes / row_bytes;
  if (all_tiles && !chunk_bytes && head.mixed()) {
    const bool few =
        in_vectors ? R <= 2 * kMostRows
                   : R <= kFewestMixedRows || (R <= kMostRows && R * row_bytes <= kMostKeptLogits);
    if (few && R * row_bytes <= kLargestChunk) {
      rows = R;
    } else if (rows < std::min(R, kFewestMixedRows) ||
               (!in_vectors && kMostRows * row_bytes > kMostKeptLogits)) {
      all_tiles = false;
      rows = kMostRows;
    }
  }
  rows = std::clamp<int64_t>(rows, 1, R);
  const int64_t chunks = (R + rows - 1) / rows;
  rows = (R + chunks - 1) / chunks;  // the last one as large as the others
  const bool finished = gradients && (rows >= R || !all_tiles);
  const int64_t narrowest = !head.mixed() ? kNarrowestTile : finished ? kFinishedTile : kMixedTile;
  int64_t width = std::max(narrowest, kTile / (rows * item) / 64 * 64);
  width = std::min({V, kWidestTile, width});
  return {.rows = rows, .width = width, .all_tiles = all_tiles};
}

}  // namespace

Plan make_plan(const Head& head, bool all_tiles, int64_t chunk_bytes) {
  return (Backend::kTiles ? make_host_plan : make_device_plan)(head, all_tiles, chunk_bytes);
}

}  // namespace seqkern::linear_cross_entropy_parts
