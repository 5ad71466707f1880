// One step of attention with a 16-bit cache, several query rows to a key head, in the matrix units:
// keys are the 16 rows of a product, query rows its 8 columns. What is not 16-bit by itself, the
// prepared queries and the weights, is a sum of 16-bit pieces, so that nothing is rounded to 16
// bits that a float32 kernel would not.
#include <type_traits>

#include "cuda/attention_step_mma.cuh"
#include "cuda/attention_step_runs.cuh"
#include "cuda/attention_step_tile.cuh"
#include "cuda/attention_step_tokens.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/mixed.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kRows = 8;   // query rows at a time
constexpr int kSide = 16;  // keys, or elements of a head, of a product
constexpr int kBlocksPerMultiprocessor = 2;
static_assert(kStepWarps == kRows);  // a warp prepares a row

// Of which a float is the sum, up to 2^-24 (bfloat16) and 2^-22 (float16) of the largest.
template <class T>
inline constexpr int kPieces = std::is_same_v<T, BFloat16> ? 3 : 2;

struct MmaShared {
  float max_of_warp[kRows][kStepWarps], sum_of_warp[kRows][kStepWarps];
  float q_scale[kRows];
  int last;  // whether this block combines
};

// Dynamic shared memory, in elements. Rows are 8 apart from a multiple of 16, so that 8 of them
// lie in different banks.
template <class T>
struct MmaLayout {
  StepTile tile;  // K and V alike, packs of a key even
  int q_stride, p_stride;
  int k, v, q, p, size;

  __host__ __device__ explicit MmaLayout(int D)
      : tile(step_tile<T>((D + kSide - 1) / kSide * kSide)) {
    q_stride = tile.packs * kPack<T> + 8;
    p_stride = tile.keys + 8;
    k = 0;
    v = k + tile.keys * tile.k_stride * kPack<T>;
    q = v + tile.keys * tile.k_stride * kPack<T>;
    p = q + kPieces<T> * kRows * q_stride;
    size = p + kPieces<T> * kRows * p_stride;
  }
};

// x as pieces that lie `stride` apart.
template <class T>
__device__ __forceinline__ void store_pieces(T* to, int stride, float x) {
#pragma unroll
  for (int i = 0; i < kPieces<T>; ++i) {
    store1(to + i * stride, x);
    x -= load1(to + i * stride);
  }
}

// sum += A B, with B [16, 8] the sum of pieces, each in memory as its columns, [8, `stride`].
template <class T>
__device__ __forceinline__ void add_products(float (&sum)[4], const uint32_t (&a)[4], const T* b,
                                             int stride) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  b += lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kPieces<T>; ++i) {
    const T* piece = b + i * kRows * stride;
    const uint32_t halves[2] = {*reinterpret_cast<const uint32_t*>(piece),
                                *reinterpret_cast<const uint32_t*>(piece + 8)};
    mma_m16n8k16<T>(sum, a, halves, sum);
  }
}

// A power of two near the largest of the warp's |x|, 1 of 0 and what is not finite.
__device__ __forceinline__ float power_of(float x) {
  x = warp_reduce(x, [](float y, float z) { return max_of(y, z); });
  const int exponent = static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127;
  if (x == 0 || exponent > 127) return 1;
  // Its inverse has to be a normal number too.
  return __uint_as_float(static_cast<uint32_t>(min(max(exponent, -126), 126) + 127) << 23);
}

template <class T>
__global__ void __launch_bounds__(kStepThreads, kBlocksPerMultiprocessor)
    attention_step_mma_kernel(const __grid_constant__ AttentionStepArgs a) {
  constexpr float kNothing = -__builtin_inff();
  const StepWork w = find_step(a);
  if (w.run >= w.runs) return;
  const int D = static_cast<int>(a.D), S = static_cast<int>(a.S);
  const int group = static_cast<int>(a.NH / a.NKV), all_rows = group * S;
  const int rank = static_cast<int>(threadIdx.x), warp = rank / kWarp, lane = rank % kWarp;
  const MmaLayout<T> layout(D);
  const StepTile& tile = layout.tile;
  const int width = tile.packs * kPack<T>, stride = tile.k_stride * kPack<T>;  // of a key
  MmaShared& shared = cuda::shared<MmaShared>();
  T* memory = dynamic_shared<T>();
  T *k = memory + layout.k, *v = memory + layout.v, *q = memory + layout.q, *p = memory + layout.p;
  const StepSource<T> keys = step_source<T>(a.k_cache, a.k_cache_strides, w.b, w.head, D);
  const StepSource<T> values = step_source<T>(a.v_cache, a.v_cache_strides, w.b, w.head, D);
  // Keys [from, end) of the tile at `first`, and zeros up to the next 16: they meet weights of 0.
  const auto copy = [&](const StepSource<T>& source, int first, int from, int end, T* to) {
    const int count = min(end, tile.keys);
    copy_keys(source, tile, D, first, from, count, to, tile.k_stride);
    if (first + end == w.end) {
      const int zeros = min(tile.keys, ceil_div(count, kSide) * kSide) - count;
      for (int i = rank; i < zeros * width; i += kStepThreads) {
        to[(count + i / width) * stride + i % width] = T{};
      }
    }
    cp_async_commit();
  };
  const auto out_at = [&](int row) {
    return head_at<T>(a.out, a.out_strides, w.b, w.head * group + row / S, row % S);
  };

  for (int row0 = 0; row0 < all_rows; row0 += kRows) {
    const int rows = min(kRows, all_rows - row0);
    if (row0 > 0) __syncthreads();  // orders the reads of the earlier rows before what follows
    const bool appends = row0 == 0 && w.end > w.position;
    int from = 0, end = (appends ? max(w.position, w.begin) : w.end) - w.begin;
#pragma unroll 1
    while (true) {
      copy(keys, w.begin, from, end, k);
      copy(values, w.begin, from, end, v);
      if (end == w.end - w.begin) break;
      append<T, T>(a, w);
      __syncthreads();  // orders the new keys and values before their copies
      from = end;
      end = w.end - w.begin;
    }
    {  // a warp prepares a row: of its power of two's size, so that float16 holds its pieces
      constexpr int kOfLane = 4;  // elements: of 128
      const int row = row0 + warp, s = row % S;
      // A token that does not fit has no position; its output is not used.
      const int position = min(w.position + s, static_cast<int>(a.L) - 1);
      const T* q_row = head_at<T>(a.q, a.q_strides, w.b, w.head * group + row / S, s);
      float x[kOfLane] = {}, largest = 0;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int d = lane + i * kWarp;
        if (warp < rows && d < D) {
          x[i] = rotated<float>(a, q_row, d, position) * static_cast<float>(a.scale);
        }
        largest = max_of(largest, x[i] < 0 ? -x[i] : x[i]);
      }
      const float power = power_of(largest);
      if (lane == 0) shared.q_scale[warp] = power;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int d = lane + i * kWarp;
        if (d < width) {
          store_pieces(q + warp * layout.q_stride + d, kRows * layout.q_stride, x[i] / power);
        }
      }
    }

    // A thread has two query rows of each product: 2 (lane % 4) and the next.
    const int row = lane % 4 * 2;
    float max[2] = {kNothing, kNothing}, sum[2] = {}, out[4] = {};
#pragma unroll 1
    for (int first = w.begin; first < w.end; first += tile.keys) {
      const int count = min(tile.keys, w.end - first);
      // The first tile's values are also under way, later ones' follow when their place is free.
      if (first == w.begin) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();  // orders q and K before the products, the last products before this V
      if (first > w.begin) copy(values, first, 0, w.end - first, v);

      // 16 keys a warp, lane / 4 and 8 more of them for each of a thread's rows.
      float x[4] = {};
      bool seen[4] = {};
      if (warp * kSide < count) {
        const T* k_row = k + (warp * kSide + lane % 16) * stride + lane / 16 * 8;
#pragma unroll 4
        for (int d = 0; d < width; d += kSide) {
          uint32_t of_k[4];
          ldmatrix<false>(of_k, k_row + d);
          add_products(x, of_k, q + d, layout.q_stride);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = row + i % 2, key = warp * kSide + lane / 4 + i / 2 * 8;
          x[i] *= shared.q_scale[r];
          if (a.softcap > 0) {
            const float cap = static_cast<float>(a.softcap);
            x[i] = tanh_of(x[i] / cap) * cap;
          }
          const int distance = w.position + (S > 1 ? (row0 + r) % S : 0) - (first + key);
          seen[i] = key < count && distance >= 0 && (a.window == 0 || distance < a.window);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = max_of(seen[i] ? x[i] : kNothing, seen[i + 2] ? x[i + 2] : kNothing);
#pragma unroll
        for (int delta = 4; delta < kWarp; delta *= 2) {
          largest = max_of(largest, __shfl_xor_sync(kAllLanes, largest, delta));
        }
        if (lane < 4) shared.max_of_warp[row + i][warp] = largest;
      }
      __syncthreads();  // orders the largest scores before their reads, K's before the next K
      const int next = min(first + tile.keys, w.end);
      if (next < w.end) {
        copy(keys, next, 0, w.end - next, k);
      } else {
        cp_async_commit();  // of nothing, so that V is always the last but one
      }

#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = max[i];
#pragma unroll
        for (int other = 0; other < kStepWarps; ++other) {
          largest = max_of(largest, shared.max_of_warp[row + i][other]);
        }
        // Of the same infinity there is no difference.
        const float factor = max[i] == largest ? 1 : softmax_exp(max[i] - largest);
        max[i] = largest;
        sum[i] *= factor;
        out[i] *= factor;
        out[i + 2] *= factor;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // A key that is not seen adds nothing, also where none is and the largest is -inf.
          const int j = i + 2 * half, key = warp * kSide + lane / 4 + 8 * half;
          const float weight = seen[j] ? softmax_exp(x[j] - largest) : 0;
          sum[i] += weight;
          if (warp * kSide < count) {
            store_pieces(p + (row + i) * layout.p_stride + key, kRows * layout.p_stride, weight);
          }
        }
      }
      cp_async_wait<1>();
      __syncthreads();  // orders the weights and V before their reads
      // 16 elements of the head a warp, as the rows of V transposed.
      if (warp * kSide < width) {
        const T* v_row = v + (lane / 16 * 8 + lane % 8) * stride + warp * kSide + lane / 8 % 2 * 8;
#pragma unroll 4
        for (int key = 0; key < count; key += kSide) {
          uint32_t of_v[4];
          ldmatrix<true>(of_v, v_row + key * stride);
          add_products(out, of_v, p + key, layout.p_stride);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int delta = 4; delta < kWarp; delta *= 2) {
        sum[i] += __shfl_xor_sync(kAllLanes, sum[i], delta);
      }
      if (lane < 4) shared.sum_of_warp[row + i][warp] = sum[i];
    }
    __syncthreads();  // orders the warps' sums before they are read
    const StepPartials<float> partials = step_partials<float>(a, w, width);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + i >= rows) continue;
      const int all_row = row0 + row + i;
      float total = 0;
#pragma unroll
      for (int other = 0; other < kStepWarps; ++other) {
        total += shared.sum_of_warp[row + i][other];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = warp * kSide + lane / 4 + 8 * half;
        if (d >= D) continue;
        if (w.runs == 1) {
          const float value = out[i + 2 * half] / total;
          store1(out_at(all_row) + d, all_row % S < w.tokens ? value : quiet_nan<float>());
        } else {
          partials.outs[(w.run * partials.rows + all_row) * partials.width + d] = out[i + 2 * half];
        }
      }
      if (w.runs > 1 && rank < 4) {
        float* ends = partials.ends + (w.run * partials.rows + all_row) * 2;
        ends[0] = max[i];
        ends[1] = total;
      }
    }
  }
  if (w.runs == 1 || !ends_row(a, w, shared.last)) return;
  combine_rows<kRows>(a, w, step_partials<float>(a, w, width),
                      reinterpret_cast<float (*)[kMostRuns]>(memory), [&](int row, int d, float x) {
                        store1(out_at(row) + d, row % S < w.tokens ? x : quiet_nan<float>());
                      });
}

// f(TypeTag<T>, name) for each kernel.
template <class F>
void for_each_half(F&& f) {
  f(TypeTag<Half>{}, "attention_step_mma<float16>");
  f(TypeTag<BFloat16>{}, "attention_step_mma<bfloat16>");
}

}  // namespace

bool attention_step_takes_mma(const AttentionStepArgs& a) {
  const bool half = a.dtype == DType::kFloat16 || a.dtype == DType::kBFloat16;
  return half && a.D <= kStepWarps * kSide && a.NH / a.NKV * a.S > 1 && current_device().major >= 8;
}

void attention_step_mma(const AttentionStepArgs& a, Stream stream) {
  for_each_half([&](auto tag, const char*) {
    using T = typename decltype(tag)::type;
    if (a.dtype != dtype_of<T>()) return;
    const MmaLayout<T> layout(static_cast<int>(a.D));
    launch(attention_step_mma_kernel<T>,
           {.name = "attention_step",
            .grid = step_grid(a),
            .block = kStepThreads,
            .smem = static_cast<unsigned>(layout.size * sizeof(T)),
            .stream = stream},
           a);
  });
}

void visit_attention_step_mma_kernels(VisitKernel visit, void* context) {
  for_each_half([&](auto tag, const char* name) {
    using T = typename decltype(tag)::type;
    visit(context, name, reinterpret_cast<const void*>(&attention_step_mma_kernel<T>));
  });
}

}  // namespace seqkern::cuda
