// The tiles of the recurrent products: compiled once per instruction set and precision, apart from
// the cells that use them.
#include "cpu/recurrent_product.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class Acc, int kVectors, int R>
void tile_product(const Acc* a, int64_t row_stride, const Acc* b, int64_t b_stride, int64_t K,
                  Acc* out, int64_t out_stride) {
  constexpr int L = kLanes<Acc>;
  Tile<Acc, R, kVectors> tile = {};
  multiply_add(tile, a, row_stride, 1, b, K, b_stride);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(out + r * out_stride + j * L, tile.c[r][j]);
  }
}

// As many rows at a time as the registers hold, evenly: 8 rows of at most 6 are 4 and 4.
template <class Acc, int kVectors>
void panel_product(const Acc* a, int64_t row_stride, int64_t rows, const Acc* b, int64_t b_stride,
                   int64_t K, Acc* out, int64_t out_stride) {
  constexpr int kAccumulators = kVectorBytes == 64 ? 24 : 12;
  constexpr int kFit = kAccumulators / kVectors;
  constexpr int kRows = kFit < 1 ? 1 : kFit > kTileRows ? kTileRows : kFit;
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    with_tile_rows<kRows>(end - begin, [&](auto count) __attribute__((always_inline)) {
      tile_product<Acc, kVectors, decltype(count)::value>(
          a + begin * row_stride, row_stride, b, b_stride, K, out + begin * out_stride, out_stride);
    });
  }
}

template <class Acc>
void block_product(const PackedMatrix<Acc>& m, int64_t block, const Acc* a, int64_t row_stride,
                   int64_t rows, Acc* out, int64_t stride) {
  const int64_t w = m.width_of(block), L = kLanes<Acc>;
  const Acc* b = m.block_data(block);
  const int panels = m.together ? 1 : m.G;
  const int64_t vectors = m.together ? m.G * w : w;
  const int64_t b_stride = m.in_place ? m.units : vectors * L;
  for (int g = 0; g < panels; ++g, b += w * L * m.K, out += w * L) {
    with_vectors<8>(vectors, [&](auto count) __attribute__((always_inline)) {
      panel_product<Acc, decltype(count)::value>(a, row_stride, rows, b, b_stride, m.K, out,
                                                 stride);
    });
  }
}

}  // namespace

void product(const PackedMatrix<float>& b, int64_t block, const float* a, int64_t row_stride,
             int64_t rows, float* out, int64_t out_stride) {
  block_product(b, block, a, row_stride, rows, out, out_stride);
}
void product(const PackedMatrix<double>& b, int64_t block, const double* a, int64_t row_stride,
             int64_t rows, double* out, int64_t out_stride) {
  block_product(b, block, a, row_stride, rows, out, out_stride);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
