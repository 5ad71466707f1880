// What a block of attention_step does with a tile of keys: copy it to shared memory in the
// background, score it, add up its values. Strides, alignments and odd widths end at the copy.
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/math.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vec.cuh"
#include "ops/attention_step.h"

namespace seqkern::cuda {

inline constexpr int kStepThreads = 256;
inline constexpr int kStepWarps = kStepThreads / kWarp;

// A tile of keys in shared memory. A key is packs of 16 bytes, zeros beyond its width D.
struct StepTile {
  int packs;     // of a key
  int lanes;     // that copy a key, and later add up its values: a power of two, at least packs
  int keys;      // of a tile, a power of two
  int k_stride;  // packs from a key of K to the next: odd, so that 8 neighbours meet all banks
};

template <class C>
__host__ __device__ constexpr StepTile step_tile(int D) {
  constexpr int kMostPacks = 2048;  // 32 KB of K, as much of V: two blocks fit an SM
  StepTile tile = {.packs = (D + kPack<C> - 1) / kPack<C>, .lanes = 1, .keys = 128, .k_stride = 0};
  while (tile.lanes < tile.packs) tile.lanes *= 2;
  while (tile.keys * tile.packs > kMostPacks) tile.keys /= 2;
  tile.k_stride = tile.packs | 1;
  return tile;
}

template <class T>
__device__ __forceinline__ T* head_at(const void* base, const HeadStrides& s, int b, int h, int t) {
  return static_cast<T*>(const_cast<void*>(base)) + b * s.b + h * s.h + t * s.t;
}

// ---------------------------------------------------------------- copies

// The keys, or values, of a head.
template <class C>
struct StepSource {
  const C* first;
  int64_t stride;  // elements from a token to the next
  int unit;        // bytes that can be copied at once: 16, 4, or 0 for less
};

template <class C>
__device__ __forceinline__ StepSource<C> step_source(const void* base, const HeadStrides& strides,
                                                     int b, int h, int D) {
  constexpr uint64_t kSize = sizeof(C);
  const C* first = head_at<C>(base, strides, b, h, 0);
  const uint64_t sizes = reinterpret_cast<uintptr_t>(first) |
                         static_cast<uint64_t>(strides.t) * kSize |
                         static_cast<uint64_t>(D) * kSize;
  return {.first = first,
          .stride = strides.t,
          .unit = sizes % 16 == 0  ? 16
                  : sizes % 4 == 0 ? 4
                                   : 0};
}

// Tokens first + [from, end) to keys [from, end) of a tile whose keys are `stride` packs apart.
template <class C>
__device__ void copy_keys(const StepSource<C>& source, const StepTile& tile, int D, int first,
                          int from, int end, C* to, int stride) {
  constexpr int P = kPack<C>;
  const int rank = static_cast<int>(threadIdx.x), pack = rank % tile.lanes;
  if (pack >= tile.packs) return;
  const int keys = kStepThreads / tile.lanes;  // at a time
  const auto copy = [&](auto&& pack_of) {
    int key = from + rank / tile.lanes;
    const C* x = source.first + (static_cast<int64_t>(first) + key) * source.stride + pack * P;
    C* y = to + (key * stride + pack) * P;
    for (; key < end; key += keys, x += keys * source.stride, y += keys * stride * P) {
      pack_of(x, y);
    }
  };
  if (source.unit == 16) {
    // Where nothing is read the address only has to be aligned.
    const bool inside = pack * P < D;
    copy([&](const C* x, C* y) { cp_async<16>(y, inside ? x : source.first, inside ? 16 : 0); });
  } else if (source.unit == 4) {
    copy([&](const C* x, C* y) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = 16 * pack + 4 * i < D * static_cast<int>(sizeof(C));
        const char* word = reinterpret_cast<const char*>(x) + 4 * i;
        cp_async<4>(reinterpret_cast<char*>(y) + 4 * i,
                    inside ? word : reinterpret_cast<const char*>(source.first), inside ? 4 : 0);
      }
    });
  } else {
    copy([&](const C* x, C* y) {
      C of_pack[P];
#pragma unroll
      for (int i = 0; i < P; ++i) of_pack[i] = pack * P + i < D ? x[i] : C{};
#pragma unroll
      for (int i = 0; i < P; ++i) y[i] = of_pack[i];
    });
  }
}

// ---------------------------------------------------------------- products

// n neighbours in shared memory, in accesses of 16 bytes where n fills them.
template <int n, class Acc>
__device__ __forceinline__ void load_shared(const Acc* p, Acc (&x)[n]) {
  constexpr int Q = kPack<Acc>;
  if constexpr (n % Q == 0) {
#pragma unroll
    for (int i = 0; i < n; i += Q) {
      Acc quad[Q];
      unpack(TypeTag<Acc>{}, load_bits(p + i), quad);
#pragma unroll
      for (int j = 0; j < Q; ++j) x[i + j] = quad[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = p[i];
  }
}

template <int n, class Acc>
__device__ __forceinline__ void store_shared(Acc* p, const Acc (&x)[n]) {
  constexpr int Q = kPack<Acc>;
  if constexpr (n % Q == 0) {
#pragma unroll
    for (int i = 0; i < n; i += Q) {
      Acc quad[Q];
#pragma unroll
      for (int j = 0; j < Q; ++j) quad[j] = x[i + j];
      store_shared16(p + i, pack(TypeTag<Acc>{}, quad));
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) p[i] = x[i];
  }
}

// Where a thread's key lies: threads of a warp share it, each taking every parts-th pack, and
// neighbouring lanes have neighbouring keys.
struct StepKey {
  int key, part, parts;
};

__device__ __forceinline__ StepKey step_key(const StepTile& tile) {
  const int rank = static_cast<int>(threadIdx.x), of_warp = tile.keys / kStepWarps;
  return {.key = rank / kWarp * of_warp + rank % of_warp,
          .part = rank % kWarp / of_warp,
          .parts = kWarp / of_warp};
}

// Elements from a pack of R rows to the next. A 16-byte step more than they take puts the packs
// that the threads of a key read at a time into different banks.
template <class C, class Acc>
__host__ __device__ constexpr int q_stride(int R) {
  return R * kPack<C> + kPack<Acc>;
}

// The products of the thread's key with all R rows of q [packs, R, P]; 0 of none from `count` on.
template <int R, class C, class Acc>
__device__ __forceinline__ void scores_of(const StepTile& tile, const StepKey& at, int count,
                                          const C* k, const Acc* q, Acc (&sum)[R]) {
  constexpr int P = kPack<C>;
  k += at.key * tile.k_stride * P;
#pragma unroll
  for (int r = 0; r < R; ++r) sum[r] = 0;
  constexpr int kStride = q_stride<C, Acc>(R);
  const int packs = at.key < count ? tile.packs : 0;
  [[maybe_unused]] constexpr int kUnroll = R < 8 ? 2 : 1;  // as far as the registers reach
#pragma unroll kUnroll
  for (int pack = at.part; pack < packs; pack += at.parts) {
    Acc x[P];
    unpack(TypeTag<C>{}, load_bits(k + pack * P), x);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Acc y[P];
      load_shared(q + pack * kStride + r * P, y);
#pragma unroll
      for (int i = 0; i < P; ++i) sum[r] += y[i] * x[i];
    }
  }
  for (int delta = kWarp / at.parts; delta < kWarp; delta *= 2) {
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], delta);
  }
}

// Merges each of R values, a power of two, over the warp: the lane gets one value's result, and the
// return says which. Halves change hands, so a step has half the exchanges of the last.
template <int R, class Acc, class Merge>
__device__ __forceinline__ int spread_reduce(const Acc (&values)[R], Merge merge, Acc& result) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Acc x[R];
#pragma unroll
  for (int r = 0; r < R; ++r) x[r] = values[r];
  int mine = 0, delta = 1;
#pragma unroll
  for (int half = R / 2; half > 0; half /= 2, delta *= 2) {
    const bool upper = lane & delta;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const Acc kept = upper ? x[r + half] : x[r], given = upper ? x[r] : x[r + half];
      x[r] = merge(kept, __shfl_xor_sync(kAllLanes, given, delta));
    }
    mine += upper ? half : 0;
  }
#pragma unroll
  for (; delta < kWarp; delta *= 2) {
    x[0] = merge(x[0], __shfl_xor_sync(kAllLanes, x[0], delta));
  }
  result = x[0];
  return mine;
}

// For each row the largest of what its kStepWarps warps left.
template <int R, class Acc>
__device__ __forceinline__ void largest_of_warps(const Acc (&of_warp)[R][kStepWarps],
                                                 Acc (&largest)[R]) {
  constexpr int kRowsAtOnce = kWarp / kStepWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int row0 = 0; row0 < R; row0 += kRowsAtOnce) {
    const int row = row0 + lane / kStepWarps;
    Acc x = of_warp[R % kRowsAtOnce == 0 || row < R ? row : 0][lane % kStepWarps];
#pragma unroll
    for (int delta = 1; delta < kStepWarps; delta *= 2) {
      x = max_of(x, __shfl_xor_sync(kAllLanes, x, delta));
    }
#pragma unroll
    for (int r = row0; r < R && r < row0 + kRowsAtOnce; ++r) {
      largest[r] = __shfl_sync(kAllLanes, x, (r - row0) * kStepWarps);
    }
  }
}

// The thread's pack of values, of every groups-th key, times the keys' weights p [keys, R].
template <int R, class C, class Acc>
__device__ __forceinline__ void add_values(const StepTile& tile, int count, const C* v,
                                           const Acc* p, Acc (&sum)[R][kPack<C>]) {
  constexpr int P = kPack<C>;
  const int rank = static_cast<int>(threadIdx.x), pack = rank % tile.lanes;
  if (pack >= tile.packs) return;
  const int groups = kStepThreads / tile.lanes;
#pragma unroll 2
  for (int key = rank / tile.lanes; key < count; key += groups) {
    Acc x[P], weight[R];
    unpack(TypeTag<C>{}, load_bits(v + (key * tile.packs + pack) * P), x);
    load_shared(p + key * R, weight);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < P; ++i) sum[r][i] += weight[r] * x[i];
    }
  }
}

}  // namespace seqkern::cuda
