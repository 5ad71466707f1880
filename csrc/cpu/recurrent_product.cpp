// The tiles of the recurrent products: compiled once per instruction set and precision, apart from
// the cells that use them.
#include "cpu/recurrent_product.h"

#include "cpu/bf16_pairs.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class Acc, int kVectors, int R>
void tile_product(const Acc* a, int64_t row_stride, const Acc* b, int64_t b_stride, int64_t K,
                  Acc* out, int64_t out_stride, bool add) {
  multiply_in_chains<Acc, R, kVectors>(out, out_stride, add, a, row_stride, 1, b, K, b_stride);
}

// As many rows at a time as the registers hold, evenly: 8 rows of at most 6 are 4 and 4.
template <class Acc, int kVectors>
void panel_product(const Acc* a, int64_t row_stride, int64_t rows, const Acc* b, int64_t b_stride,
                   int64_t K, Acc* out, int64_t out_stride, bool add) {
  constexpr int kAccumulators = kManyRegisters ? 24 : 12;
  constexpr int kFit = kAccumulators / kVectors;
  constexpr int kRows = kFit < 1 ? 1 : kFit > kTileRows ? kTileRows : kFit;
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    with_tile_rows<kRows>(end - begin, [&](auto count) __attribute__((always_inline)) {
      tile_product<Acc, kVectors, decltype(count)::value>(a + begin * row_stride, row_stride, b,
                                                          b_stride, K, out + begin * out_stride,
                                                          out_stride, add);
    });
  }
}

#if defined(SEQKERN_TILES)

// Rows of the tiles of A and C, as this thread's registers have them now; 0: not known.
thread_local int64_t rows_of_tiles = 0;

// Tiles 0 to 3 are C, 4 is A, 5 to 7 are B.
void shape_for(int64_t rows) {
  if (rows == rows_of_tiles) return;
  shape_tiles(rows, 4);
  rows_of_tiles = rows;
}

template <int NV>
SEQKERN_INLINE void load_sums(const float* from, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  load_tile<0>(from, bytes);
  if constexpr (NV > 1) load_tile<1>(from + 16, bytes);
  if constexpr (NV > 2) load_tile<2>(from + 32, bytes);
  if constexpr (NV > 3) load_tile<3>(from + 48, bytes);
}
template <int NV>
SEQKERN_INLINE void zero_sums() {
  zero_tile<0>();
  if constexpr (NV > 1) zero_tile<1>();
  if constexpr (NV > 2) zero_tile<2>();
  if constexpr (NV > 3) zero_tile<3>();
}
template <int NV>
SEQKERN_INLINE void store_sums(float* out, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  store_tile<0>(out, bytes);
  if constexpr (NV > 1) store_tile<1>(out + 16, bytes);
  if constexpr (NV > 2) store_tile<2>(out + 32, bytes);
  if constexpr (NV > 3) store_tile<3>(out + 48, bytes);
}
// Between two products that add to the same sum lie those of the others, which take about as long
// as one of them waits for its result.
template <int NV>
SEQKERN_INLINE void add_products(const uint16_t* a, int64_t row_bytes, const uint16_t* b) {
  load_tile<4>(a, row_bytes);
  load_tile<5>(b, 64);
  multiply_tiles<0, 4, 5>();
  if constexpr (NV > 1) {
    load_tile<6>(b + kTileNumbers, 64);
    multiply_tiles<1, 4, 6>();
  }
  if constexpr (NV > 2) {
    load_tile<7>(b + 2 * kTileNumbers, 64);
    multiply_tiles<2, 4, 7>();
  }
  if constexpr (NV > 3) {
    load_tile<5>(b + 3 * kTileNumbers, 64);
    multiply_tiles<3, 4, 5>();
  }
}

// out [rows, NV tiles]. The products of the first parts are summed apart from the small ones, each
// of which would round the sum.
template <int NV>
void panel_of_tiles(const uint16_t* a, int64_t row_bytes, int64_t part_stride, int64_t rows,
                    const uint16_t* b, int64_t depths, int parts, float* out, int64_t stride,
                    bool add) {
  const int64_t b_part = NV * kTileNumbers, b_depth = parts * b_part;
  add ? load_sums<NV>(out, stride) : zero_sums<NV>();
  for (int64_t d = 0; d < depths; ++d) {
    add_products<NV>(a + d * kTileDepth, row_bytes, b + d * b_depth);
  }
  store_sums<NV>(out, stride);
  if (parts == 1) return;
  zero_sums<NV>();
  for (int64_t d = 0; d < depths; ++d) {
    for (int q = 0; q < parts; ++q) {
      for (int p = q == 0 ? 1 : 0; p < parts; ++p) {
        add_products<NV>(a + p * part_stride + d * kTileDepth, row_bytes,
                         b + d * b_depth + q * b_part);
      }
    }
  }
  alignas(64) float small[kTileHeight * NV * 16];
  store_sums<NV>(small, NV * 16);
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < NV; ++j) {
      const VecF sum = load(out + r * stride + j * 16);
      // The lower parts of infinity are none.
      const VecI32 infinite = (bitcast<VecI32>(sum) & 0x7fffffff) == 0x7f800000;
      const VecF all = sum + load(small + (r * NV + j) * 16);
      store(out + r * stride + j * 16, select(infinite, sum, all));
    }
  }
}

#elif defined(SEQKERN_BF16_PAIRS)

void shape_for(int64_t) {}

// out [rows, NV tiles], of one part.
template <int NV>
void panel_of_tiles(const uint16_t* a, int64_t row_bytes, int64_t, int64_t rows, const uint16_t* b,
                    int64_t depths, int, float* out, int64_t stride, bool add) {
  constexpr int kRows = kPairRows<NV>;
  const int64_t a_row = row_bytes / 2, tiles = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    with_tile_rows<kRows>(end - begin, [&](auto count) {
      multiply_pairs<decltype(count)::value, NV>(
          {a + begin * a_row, a_row, kTileDepth}, {b, kTileNumbers, NV * kTileNumbers},
          depths * kTileDepth, out + begin * stride, stride, add);
    });
  }
}

#endif

#if defined(SEQKERN_TILES) || defined(SEQKERN_BF16_PAIRS)

void product_of_tiles(const PackedMatrix<float>& m, int64_t block, const float* a,
                      int64_t row_stride, int64_t rows, float* out, int64_t stride, bool add) {
  shape_for(rows);
  const int64_t w = m.width_of(block);
  const auto* b = reinterpret_cast<const uint16_t*>(m.block_data(block));
  for (int g = 0; g < m.G; ++g, out += w * 16) {
    with_vectors<kColumnTiles>(w, [&](auto count) {
      panel_of_tiles<decltype(count)::value>(
          reinterpret_cast<const uint16_t*>(a), row_stride * static_cast<int64_t>(sizeof(float)),
          m.part_stride(), rows, b, tile_depths(m.K), m.parts, out, stride, add);
    });
    b += w * tile_depths(m.K) * m.parts * kTileNumbers;
  }
}

#endif

template <class Acc>
void block_product(const PackedMatrix<Acc>& m, int64_t block, const Acc* a, int64_t row_stride,
                   int64_t rows, Acc* out, int64_t stride, bool add) {
#if defined(SEQKERN_TILES) || defined(SEQKERN_BF16_PAIRS)
  if constexpr (sizeof(Acc) == 4) {
    if (m.parts) return product_of_tiles(m, block, a, row_stride, rows, out, stride, add);
  }
#endif
  const int64_t w = m.width_of(block), L = kLanes<Acc>;
  const Acc* b = m.block_data(block);
  const int panels = m.together ? 1 : m.G;
  const int64_t vectors = m.together ? m.G * w : w;
  const int64_t b_stride = m.in_place ? m.units : vectors * L;
  for (int g = 0; g < panels; ++g, b += w * L * m.K, out += w * L) {
    with_vectors<8>(vectors, [&](auto count) __attribute__((always_inline)) {
      panel_product<Acc, decltype(count)::value>(a, row_stride, rows, b, b_stride, m.K, out, stride,
                                                 add);
    });
  }
}

}  // namespace

#if defined(SEQKERN_TILES)
ProductSession::ProductSession() { rows_of_tiles = 0; }
#endif

void product(const PackedMatrix<float>& b, int64_t block, const float* a, int64_t row_stride,
             int64_t rows, float* out, int64_t out_stride, bool add) {
  block_product(b, block, a, row_stride, rows, out, out_stride, add);
}
void product(const PackedMatrix<double>& b, int64_t block, const double* a, int64_t row_stride,
             int64_t rows, double* out, int64_t out_stride, bool add) {
  block_product(b, block, a, row_stride, rows, out, out_stride, add);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
