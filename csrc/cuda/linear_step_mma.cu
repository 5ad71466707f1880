// linear_step on the matrix units: a block's warps share the inputs of 16 or 32 rows of the weight,
// whose tiles are operands as they come from memory, for up to 32 rows of x at a time. What a call
// costs beyond reading the weight hardly grows with the rows. Of more than a few rows a launch
// before makes the numbers that are multiplied. Derivation: docs/math/linear_step.md.
#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/linear_step_mma.cuh"
#include "cuda/linear_step_rows.cuh"
#include "cuda/linear_step_split.cuh"
#include "cuda/mixed.cuh"
#include "cuda/ptx.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileK = 512;  // inputs of x in shared memory at a time
constexpr int kChunk = 32;   // inputs of two products: 8 of each of a row's 4 lanes
constexpr int kChunks = kTileK / kChunk / kWarps;  // of a warp
// From a row of x to the next: 8 lanes that read 16 bytes each, 4 of one row, meet all banks.
constexpr int kStride = kTileK + kChunk;

// Rows of x up to which a block normalises and splits them for itself.
constexpr int kFewRows = 4;

// What is multiplied: x as it is, or three numbers of W's type whose sum is a normalised x, which
// the block makes, or finds made.
enum class Source { kWhole, kSplit, kPrepared };

// kTiles of 8 rows of x at a time.
template <Source kSource, int kTiles>
struct MmaShape {
  static constexpr int kParts = kSource == Source::kWhole ? 1 : 3;
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kRowTiles = kTiles == 1 ? 1 : 2;  // of 16 rows of the weight
  static constexpr int kRows = 16 * kRowTiles;
  // From the sums of a row of the weight to the next: 4 rows' are written at once.
  static constexpr int kSumStride = kColumns == 8 ? 8 : kColumns + 8;
  static constexpr int kBytesOfX = kParts * kColumns * kStride * 2;
  static constexpr int kBytesOfSums = kWarps * kRows * kSumStride * 4;
  static constexpr int kBytes = kBytesOfX > kBytesOfSums ? kBytesOfX : kBytesOfSums;
};

template <class T, int kColumns>
struct MmaShared {
  StepRows<T, kColumns> rows;
  float of_warp[kColumns < 4 ? kColumns : 4][kWarps];
};

// Inputs [k0, k0 + kTileK) of rows n0 and on: rows that there are not are zeros, as is what is
// beyond K.
template <class T, class W, Source kSource, int kTiles>
__device__ __forceinline__ void load_tile(const LinearStepArgs& a, int64_t n0, int rows, int k0,
                                          MmaShared<T, 8 * kTiles>& shared, W* x) {
  using Shape = MmaShape<kSource, kTiles>;
  constexpr int kParts = Shape::kParts, kPacks = kTileK / kPackInputs;
  static_assert(kThreads % kPacks == 0);
  const int K = static_cast<int>(a.K), rank = static_cast<int>(threadIdx.x);
  const int pack = rank % kPacks * kPackInputs, k = k0 + pack;  // of all of the thread's rows
  // Zeros of rows that there are not stay from the first tile.
  const int wanted = k0 == 0 ? Shape::kColumns : rows;
  const auto store = [&](int row, const uint4(&parts)[kParts]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      store_shared16(x + (part * Shape::kColumns + row) * kStride + pack, parts[part]);
    }
  };
  if constexpr (kSource == Source::kSplit) {
    float w[kPackInputs], b[kPackInputs];
    NormPack<W>(a, k).values(w, b);
#pragma unroll 1
    for (int row = rank / kPacks; row < wanted; row += kThreads / kPacks) {
      uint4 parts[kParts] = {};
      if (row < rows) {
        const T* of_x[1] = {shared.rows.x[row]};
        split_pack<T, W>(of_x[0], are_aligned(of_x, K), shared.rows.mean[row],
                         shared.rows.scale[row], w, b, k, K, parts);
      }
      store(row, parts);
    }
  } else {
    const int64_t width = prepared_width(K);
#pragma unroll 2
    for (int row = rank / kPacks; row < wanted; row += kThreads / kPacks) {
      uint4 parts[kParts] = {};
      if (row < rows && kSource == Source::kPrepared && k < K) {
        const W* prepared = static_cast<const W*>(a.workspace) + (n0 + row) * width + k;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          parts[part] = load_bits(prepared + part * a.N * width);
        }
      } else if (row < rows && kSource == Source::kWhole) {
        uint4 bits[1][1];
        const W* of_x[1] = {reinterpret_cast<const W*>(shared.rows.x[row])};
        load_packs(of_x, are_aligned(of_x, K), k, 0, K, bits);
        parts[0] = bits[0][0];
      }
      store(row, parts);
    }
  }
}

// sums += a chunk of W times one of x. The tensor core cuts sums off where an addition of floats
// rounds: of x in parts, whose result is to be as exact as one of floats, a chunk is summed apart,
// its small parts first.
template <class W, int kParts>
__device__ __forceinline__ void multiply(const uint4 (&w)[2], const uint4 (&x)[kParts],
                                         float (&sum)[4]) {
  const uint32_t first[4] = {w[0].x, w[1].x, w[0].y, w[1].y};
  const uint32_t second[4] = {w[0].z, w[1].z, w[0].w, w[1].w};
  float of_chunk[4] = {};
  float (&into)[4] = kParts == 1 ? sum : of_chunk;
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) {
    mma_m16n8k16<W>(into, first, {x[part].x, x[part].y}, into);
    mma_m16n8k16<W>(into, second, {x[part].z, x[part].w}, into);
  }
  if constexpr (kParts > 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += of_chunk[i];
  }
}

// Of a row, all of it: a block each.
template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    linear_step_prepare_kernel(const __grid_constant__ LinearStepArgs a) {
  MmaShared<T, 1>& shared = cuda::shared<MmaShared<T, 1>>();
  const int64_t n = blockIdx.x, width = prepared_width(a.K);
  const int K = static_cast<int>(a.K);
  find_rows(a, n, shared.rows);
  __syncthreads();  // orders the row's place before its reads
  measure_rows<1>(a, shared.rows, 0, shared.of_warp);
  __syncthreads();  // orders mean and scale before their reads
  const T* of_x[1] = {shared.rows.x[0]};
  const bool aligned = are_aligned(of_x, K);
  W* to = static_cast<W*>(a.workspace) + n * width;
  for (int k = static_cast<int>(threadIdx.x) * kPackInputs; k < K; k += kThreads * kPackInputs) {
    float w[kPackInputs], b[kPackInputs];
    NormPack<W>(a, k).values(w, b);
    uint4 parts[3];
    split_pack<T, W>(of_x[0], aligned, shared.rows.mean[0], shared.rows.scale[0], w, b, k, K,
                     parts);
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      *reinterpret_cast<uint4*>(to + part * a.N * width + k) = parts[part];
    }
  }
}

template <class T, class W, Source kSource, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    linear_step_mma_kernel(const __grid_constant__ LinearStepArgs a) {
  using Shape = MmaShape<kSource, kTiles>;
  constexpr int kParts = Shape::kParts;
  constexpr int kRowTiles = Shape::kRowTiles, kColumns = Shape::kColumns;
  MmaShared<T, kColumns>& shared = cuda::shared<MmaShared<T, kColumns>>();
  W* x = dynamic_shared<W>();
  const int K = static_cast<int>(a.K), rank = static_cast<int>(threadIdx.x);
  const int lane = rank % kWarp, warp = rank / kWarp;
  // Of a tile's 16 rows a lane has two: of outputs 8 apart, or of the halves of a gated one.
  const int of_tile = a.gated ? 8 : 16, outputs = kRowTiles * of_tile;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * outputs;
  const W* weight[2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    // A row beyond the last one is not stored; the last is read in its place.
    const int64_t m = m0 + i / 2 * of_tile + lane / 4 + (a.gated ? 0 : i % 2 * 8);
    const int64_t row = (m < a.M ? m : a.M - 1) + (a.gated ? i % 2 * a.M : 0);
    weight[i] = static_cast<const W*>(a.weight) + row * a.weight_stride;
  }
  const bool aligned = K % kPackInputs == 0 && a.weight_stride % kPackInputs == 0 &&
                       is_aligned(static_cast<const W*>(a.weight));
  const int of_lane = warp * kChunks * kChunk + lane % 4 * kPackInputs;  // its inputs of a tile

  for (int64_t n0 = 0; n0 < a.N; n0 += kColumns) {
    const int rows = static_cast<int>(a.N - n0 < kColumns ? a.N - n0 : kColumns);
    float sum[kRowTiles][kTiles][4] = {};
    uint4 w[kChunks][2 * kRowTiles];
    load_packs(weight, aligned, of_lane, kChunk, K, w);
    if (n0 > 0) __syncthreads();  // orders the reads of the rows before, of their places
    find_rows(a, n0, shared.rows);
    __syncthreads();  // orders the rows' places before their reads
    if constexpr (kSource == Source::kSplit) {
      static_assert(kFewRows <= 4 && kTiles == 1);
      if (rows == 1) {
        measure_rows<1>(a, shared.rows, 0, *reinterpret_cast<float (*)[1][kWarps]>(shared.of_warp));
      } else {
        measure_rows<4>(a, shared.rows, 0, shared.of_warp);
      }
    }
#pragma unroll 1
    for (int k0 = 0; k0 < K; k0 += kTileK) {
      __syncthreads();  // orders means, and the reads of the tile before, before this tile
      load_tile<T, W, kSource, kTiles>(a, n0, rows, k0, shared, x);
      __syncthreads();  // orders the tile before its reads
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint4 of_x[kParts];
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            of_x[part] = load_bits(x + (part * kColumns + tile * 8 + lane / 4) * kStride + of_lane +
                                   u * kChunk);
          }
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply<W, kParts>({w[u][2 * i], w[u][2 * i + 1]}, of_x, sum[i][tile]);
          }
        }
        // The next tile's are under way while the other chunks are multiplied and x is loaded.
        const int next = k0 + kTileK + of_lane + u * kChunk;
        uint4 chunk[1][2 * kRowTiles];
        load_packs(weight, aligned, next, 0, K, chunk);
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) w[u][i] = chunk[0][i];
      }
    }

    __syncthreads();  // orders the reads of x before the sums that take its place
    float* sums = reinterpret_cast<float*>(x);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp * Shape::kRows + i * 16 + half * 8 + lane / 4;
          float* to = sums + row * Shape::kSumStride + tile * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(to) =
              make_float2(sum[i][tile][2 * half], sum[i][tile][2 * half + 1]);
        }
      }
    }
    __syncthreads();  // orders the warps' sums before their reads
    for (int i = rank; i < outputs * rows; i += kThreads) {
      const int m = i % outputs, column = i / outputs;
      if (m0 + m >= a.M) continue;
      const auto total = [&](int row) {
        float y = 0;
#pragma unroll
        for (int from = 0; from < kWarps; ++from) {
          y += sums[(from * Shape::kRows + row) * Shape::kSumStride + column];
        }
        return y;
      };
      const int row = a.gated ? m / 8 * 16 + m % 8 : m;
      complete<T, W>(a, n0 + column, m0 + m, shared.rows.residual[column], total(row),
                     a.gated ? total(row + 8) : 0.0f);
    }
  }
}

// f(TypeTag<T>, TypeTag<W>, "<T, W>") where x is split.
template <class F>
void for_each_split(F&& f) {
  f(TypeTag<BFloat16>{}, TypeTag<BFloat16>{}, "<bfloat16>");
  f(TypeTag<float>{}, TypeTag<BFloat16>{}, "<float32, bfloat16>");
}

// f(TypeTag<T>, TypeTag<W>, a constant Source, a constant kTiles, name) for each kernel of
// products.
template <class F>
void for_each_product(F&& f) {
  const auto call = [&](auto tag, auto weight_tag, auto source, auto tiles,
                        const std::string& types) {
    constexpr const char* kNames[] = {"whole", "split", "prepared"};
    f(tag, weight_tag, source, tiles,
      "linear_step_mma" + types + " " + kNames[static_cast<int>(source.value)] + " rows " +
          std::to_string(8 * tiles));
  };
  constexpr std::integral_constant<Source, Source::kWhole> kWhole;
  constexpr std::integral_constant<Source, Source::kSplit> kSplit;
  constexpr std::integral_constant<Source, Source::kPrepared> kPrepared;
  constexpr std::integral_constant<int, 1> k8;
  constexpr std::integral_constant<int, 2> k16;
  constexpr std::integral_constant<int, 4> k32;
  const auto whole = [&](auto tag, const char* types) {
    call(tag, tag, kWhole, k8, types);
    call(tag, tag, kWhole, k16, types);
    call(tag, tag, kWhole, k32, types);
  };
  whole(TypeTag<Half>{}, "<float16>");
  whole(TypeTag<BFloat16>{}, "<bfloat16>");
  for_each_split([&](auto tag, auto weight_tag, const char* types) {
    call(tag, weight_tag, kSplit, k8, types);
    call(tag, weight_tag, kPrepared, k8, types);
    call(tag, weight_tag, kPrepared, k16, types);
  });
}

Source source_of(const LinearStepArgs& a) {
  if (a.norm == StepNorm::kNone && a.dtype == a.weight_dtype) return Source::kWhole;
  return a.N <= kFewRows ? Source::kSplit : Source::kPrepared;
}

}  // namespace

bool linear_step_takes_mma(const LinearStepArgs& a) {
  const bool takes = a.weight_dtype == DType::kBFloat16 ||
                     (a.weight_dtype == DType::kFloat16 && source_of(a) == Source::kWhole);
  return takes && current_device().major >= 8;
}

int64_t linear_step_mma_workspace(const LinearStepArgs& a) {
  return source_of(a) == Source::kPrepared ? 3 * a.N * prepared_width(a.K) * 2 : 0;
}

void linear_step_mma(const LinearStepArgs& a, Stream stream) {
  const Source source = source_of(a);
  const int tiles = a.N <= 8 ? 1 : a.N <= 16 || source != Source::kWhole ? 2 : 4;
  const int64_t outputs = (tiles == 1 ? 16 : 32) / (a.gated ? 2 : 1);
  const int64_t blocks = ceil_div(a.M, outputs);
  if (blocks > INT_MAX || a.N > INT_MAX || a.K > kMostElements) {
    throw_value_error("linear_step: x must be at most [2^31, 2^31 - 2^13] and weight [2^34, ...] " +
                      std::string("on CUDA, got [") + std::to_string(a.N) + ", " +
                      std::to_string(a.K) + "] and [" + std::to_string(a.M) + ", ...]");
  }
  LaunchConfig config{.name = "linear_step", .block = kThreads, .stream = stream};
  if (source == Source::kPrepared) {
    config.grid = dim3(static_cast<unsigned>(a.N));
    for_each_split([&](auto tag, auto weight_tag, const char*) {
      using T = typename decltype(tag)::type;
      using W = typename decltype(weight_tag)::type;
      if (a.dtype == dtype_of<T>()) launch(linear_step_prepare_kernel<T, W>, config, a);
    });
  }
  config.grid = dim3(static_cast<unsigned>(blocks));
  for_each_product(
      [&](auto tag, auto weight_tag, auto source_tag, auto tiles_tag, const std::string&) {
        using T = typename decltype(tag)::type;
        using W = typename decltype(weight_tag)::type;
        constexpr Source kSource = source_tag;
        constexpr int kTiles = tiles_tag;
        if (a.dtype != dtype_of<T>() || a.weight_dtype != dtype_of<W>() || source != kSource ||
            tiles != kTiles) {
          return;
        }
        config.smem = static_cast<unsigned>(MmaShape<kSource, kTiles>::kBytes);
        launch(linear_step_mma_kernel<T, W, kSource, kTiles>, config, a);
      });
}

void visit_linear_step_mma_kernels(VisitKernel visit, void* context) {
  for_each_split([&](auto tag, auto weight_tag, const char* types) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(weight_tag)::type;
    visit(context, (std::string("linear_step_prepare") + types).c_str(),
          reinterpret_cast<const void*>(&linear_step_prepare_kernel<T, W>));
  });
  for_each_product(
      [&](auto tag, auto weight_tag, auto source, auto tiles, const std::string& name) {
        using T = typename decltype(tag)::type;
        using W = typename decltype(weight_tag)::type;
        visit(context, name.c_str(),
              reinterpret_cast<const void*>(&linear_step_mma_kernel<T, W, source, tiles>));
      });
}

}  // namespace seqkern::cuda
