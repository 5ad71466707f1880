// The linear layer of a decoding step in the matrix unit. A tile of the weight is read where it
// lies: 16 of its rows, 32 inputs. The other operand is tiles of prepared rows, up to 16 rows as
// their columns, which costs as much for 16 as for one.
//
// A row that holds more than bf16 numbers is three of them, exactly: so a product has no more of an
// error than one of floats.
#include <utility>

#include "cpu/kernels.h"
#include "cpu/linear_step.h"
#include "cpu/linear_step_plan.h"
#include "cpu/matrix_tiles.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kMostTiles = LinearStepTiles::kMostGroups;  // of the weight, 16 outputs each
// Blocks of rows that meet a part of those tiles while first-level cache holds it.
constexpr int64_t kMostBlocks = 8, kPart = 96;
static_assert(LinearStepTiles::kMostColumns == kTileHeight);
static_assert(LinearStepTiles::kDepth == kTileDepth && kPart % kTileDepth == 0);
static_assert(kStepOutputs == kTileHeight);

// f.operator()<t>() of the tiles t that are sums.
template <int kTiles, class F>
SEQKERN_INLINE void for_tiles(F f) {
  [&]<int... t>(std::integer_sequence<int, t...>) __attribute__((always_inline)) {
    (f.template operator()<t>(), ...);
  }(std::make_integer_sequence<int, kTiles>{});
}

// ---------------------------------------------------------------- rows

// The 16 words of each of 16 rows as the 16 lines of a tile, of which `columns` words are kept.
SEQKERN_INLINE void store_tile_of(const uint16_t (&rows)[kTileHeight][kTileDepth], int64_t columns,
                                  uint32_t* to) {
  if (columns == 1) {
    __builtin_memcpy(to, rows[0], sizeof(rows[0]));
    return;
  }
  VecU32 line[kTileHeight];
  for (int64_t i = 0; i < kTileHeight; ++i) __builtin_memcpy(&line[i], rows[i], sizeof(line[i]));
  transpose(line);
  for (int64_t i = 0; i < kTileHeight; ++i, to += columns) {
    if (columns == LinearStepTiles::kMostColumns) [[likely]] {
      __builtin_memcpy(to, &line[i], sizeof(line[i]));
    } else {
      for (int64_t n = 0; n < columns; ++n) to[n] = line[i][n];
    }
  }
}

// bf16 numbers that add up to v, each kTileNumbers after the one before it; of infinity, all but
// the first are zeros.
template <int kParts>
SEQKERN_INLINE void split(VecF v, uint16_t* to) {
  store_parts(to, kTileNumbers, 1, v);
  if constexpr (kParts > 1) {
    const VecI32 infinite = (bitcast<VecI32>(v) & 0x7fffffff) == 0x7f800000;
    next_part(v);
    store_parts(to + kTileNumbers, kTileNumbers, kParts - 1, select(infinite, VecF{}, v));
  }
}

template <int kParts, class T>
void prepare(const LinearStepArgs& a, const LinearStepTiles& plan, int64_t block) {
  const int64_t first = block * plan.kMostColumns;
  const int64_t count = a.N - first < plan.columns ? a.N - first : plan.columns;
  float* x = static_cast<float*>(a.workspace) + first * plan.width;
  for (int64_t i = 0; i < count; ++i) {
    prepare_row<T, BFloat16>(a, first + i, x + i * plan.width, plan.width);
  }
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<char*>(a.workspace) + plan.rows_bytes) +
                 block * plan.block_pairs();
  alignas(64) uint16_t part[kParts][kTileHeight][kTileDepth] = {};
  for (int64_t k = 0; k < plan.width; k += kTileDepth) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < kTileDepth; j += kLanes<float>) {
        split<kParts>(load(x + i * plan.width + k + j), &part[0][i][j]);
      }
    }
    for (int p = 0; p < kParts; ++p, to += plan.tile_pairs()) {
      store_tile_of(part[p], plan.columns, to);
    }
  }
}

// ---------------------------------------------------------------- products

// Tiles 0 to 3 are sums, 4 a weight's, 5 to 7 the parts of rows.
void shape(int64_t columns) {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = kTileHeight;
    shapes.row_bytes[i] =
        static_cast<uint16_t>(i == 4 ? 64 : columns * LinearStepTiles::kPairBytes);
  }
  set_tile_shapes(shapes);
}

template <int kParts>
SEQKERN_INLINE void load_rows(const uint32_t* x, int64_t columns) {
  const int64_t tile = LinearStepTiles::kDepth / 2 * columns;
  const int64_t stride = columns * LinearStepTiles::kPairBytes;
  load_tile<5>(x, stride);
  if constexpr (kParts > 1) load_tile<6>(x + tile, stride);
  if constexpr (kParts > 2) load_tile<7>(x + 2 * tile, stride);
}

template <int kParts, int t>
SEQKERN_INLINE void add_product(const uint16_t* w, int64_t bytes) {
  load_tile<4>(w, bytes);
  multiply_tiles<t, 4, 5>();
  if constexpr (kParts > 1) multiply_tiles<t, 4, 6>();
  if constexpr (kParts > 2) multiply_tiles<t, 4, 7>();
}

// The same where the tile has fewer rows or columns: those there are, in zeros.
template <int kParts, int t>
SEQKERN_INLINE void add_part(const uint16_t* w, int64_t stride, int64_t rows, int64_t columns) {
  alignas(64) uint16_t whole[kTileHeight][kTileDepth] = {};
  for (int64_t r = 0; r < rows && r < kTileHeight; ++r) {
    __builtin_memcpy(whole[r], w + r * stride, columns * sizeof(uint16_t));
  }
  add_product<kParts, t>(whole[0], 64);
}

// sums [kTiles, 16 outputs, columns], whose lines are `line` floats apart, (+)= the products of a
// block of rows x and the rows of the weight from w on, where there are `rows`, over K inputs.
template <int kTiles, int kParts>
void project(const LinearStepTiles& plan, const uint16_t* w, int64_t stride, int64_t rows,
             int64_t K, const uint32_t* x, float* sums, int64_t line, bool add) {
  const int64_t line_bytes = line * static_cast<int64_t>(sizeof(float));
  const int64_t tile = kTileHeight * line;
  for_tiles<kTiles>([&]<int t>() __attribute__((always_inline)) {
    add ? load_tile<t>(sums + t * tile, line_bytes) : zero_tile<t>();
  });
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t step = kParts * plan.tile_pairs(), next = kTileHeight * stride;
  const int64_t whole = rows < kTiles * kTileHeight ? 0 : K / kTileDepth * kTileDepth;
  int64_t k = 0;
  for (; k < whole; k += kTileDepth, x += step, w += kTileDepth) {
    load_rows<kParts>(x, plan.columns);
    for_tiles<kTiles>([&]<int t>() __attribute__((always_inline)) {
      add_product<kParts, t>(w + t * next, bytes);
    });
  }
  for (; k < K; k += kTileDepth, x += step, w += kTileDepth) {
    const int64_t left = K - k < kTileDepth ? K - k : kTileDepth;
    load_rows<kParts>(x, plan.columns);
    for_tiles<kTiles>([&]<int t>() __attribute__((always_inline)) {
      add_part<kParts, t>(w + t * next, stride, rows, left);
    });
  }
  for_tiles<kTiles>(
      [&]<int t>() __attribute__((always_inline)) { store_tile<t>(sums + t * tile, line_bytes); });
}

// ---------------------------------------------------------------- outputs

// Sums of a tile as vectors of the outputs of a row.
SEQKERN_INLINE void load_sums(const float* sums, int64_t line, VecF (&of_row)[kTileHeight]) {
  if (line == 1) {
    of_row[0] = load(sums);
    return;
  }
  for (int64_t m = 0; m < kTileHeight; ++m) of_row[m] = load(sums + m * line);
  transpose(of_row);
}

// Outputs of kTiles groups from m on, where there are `count`, of all rows.
template <int kTiles, int kParts, class T>
void make_outputs(const LinearStepArgs& a, const LinearStepTiles& plan, int64_t m, int64_t count) {
  constexpr int64_t kTile = kTileHeight * LinearStepTiles::kMostColumns;
  alignas(64) float sums[2][kMostBlocks][kTiles * kTile];  // written by tile instructions alone
  const int64_t line = plan.columns == 1 ? 1 : kTileHeight;
  const auto* rows =
      reinterpret_cast<const uint32_t*>(static_cast<const char*>(a.workspace) + plan.rows_bytes);
  // The sums of some blocks: a part of the inputs of all of them after another.
  const auto products = [&](int64_t from, int64_t block, int64_t blocks, auto& to) {
    const auto* w = static_cast<const uint16_t*>(a.weight) + from * a.weight_stride;
    const int64_t part = blocks == 1 ? a.K : kPart;
    for (int64_t k = 0; k < a.K; k += part) {
      const int64_t K = a.K - k < part ? a.K - k : part;
      const uint32_t* x =
          rows + block * plan.block_pairs() + k / kTileDepth * kParts * plan.tile_pairs();
      for (int64_t i = 0; i < blocks; ++i) {
        project<kTiles, kParts>(plan, w + k, a.weight_stride, count, K, x + i * plan.block_pairs(),
                                to[i], line, k > 0);
      }
    }
  };
  for (int64_t block = 0; block < plan.blocks; block += kMostBlocks) {
    const int64_t blocks = plan.blocks - block < kMostBlocks ? plan.blocks - block : kMostBlocks;
    products(m, block, blocks, sums[0]);
    if (a.gated) products(a.M + m, block, blocks, sums[1]);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t n = (block + i) * plan.kMostColumns;
      const int64_t some = a.N - n < plan.columns ? a.N - n : plan.columns;
      for (int64_t t = 0; t < kTiles; ++t) {
        const int64_t first = t * kTileHeight, left = count - first;
        VecF out[kTileHeight], up[kTileHeight] = {};
        load_sums(sums[0][i] + first * line, line, out);
        if (a.gated) load_sums(sums[1][i] + first * line, line, up);
        for (int64_t r = 0; r < some; ++r) {
          complete<T, BFloat16>(a, n + r, m + first,
                                static_cast<int>(left < kTileHeight ? left : kTileHeight), out[r],
                                up[r]);
        }
      }
    }
  }
}

template <int kParts, class T>
void run(const LinearStepArgs& a, const LinearStepTiles& plan, int64_t begin, int64_t end) {
  const int64_t last = end * kStepOutputs < a.M ? end * kStepOutputs : a.M;
  int64_t m = begin * kStepOutputs;
  for (; m + kMostTiles * kTileHeight <= last; m += kMostTiles * kTileHeight) {
    make_outputs<kMostTiles, kParts, T>(a, plan, m, kMostTiles * kTileHeight);
  }
  for (; m < last; m += kTileHeight) make_outputs<1, kParts, T>(a, plan, m, last - m);
}

}  // namespace

// Tasks: blocks of rows.
void linear_step_tiles_prepare(const LinearStepArgs& a, int64_t begin, int64_t end) {
  const LinearStepTiles plan(a);
  for (int64_t block = begin; block < end; ++block) {
    if (a.dtype != DType::kBFloat16) {
      prepare<3, float>(a, plan, block);
    } else if (plan.parts == 1) {
      prepare<1, BFloat16>(a, plan, block);
    } else {
      prepare<3, BFloat16>(a, plan, block);
    }
  }
}

// Tasks: groups of kStepOutputs outputs.
void linear_step_tiles(const LinearStepArgs& a, int64_t begin, int64_t end) {
  const LinearStepTiles plan(a);
  const TileSession session;
  shape(plan.columns);
  if (a.dtype != DType::kBFloat16) return run<3, float>(a, plan, begin, end);
  if (plan.parts == 1) return run<1, BFloat16>(a, plan, begin, end);
  run<3, BFloat16>(a, plan, begin, end);
}

}  // namespace seqkern::cpu::SEQKERN_ISA
