// 128-bit access to rows of any alignment: the elements before the first 16-byte boundary and after
// the last are peeled, so that a row of V = 50257 at an odd offset still moves 16 bytes per load.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace seqkern::cuda {

template <class T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));  // elements per 128-bit access

// ---------------------------------------------------------------- one element

__device__ __forceinline__ float load1(const float* p) { return *p; }
__device__ __forceinline__ double load1(const double* p) { return *p; }
__device__ __forceinline__ float load1(const Half* p) {
  return __half2float(__ushort_as_half(p->bits));
}
__device__ __forceinline__ float load1(const BFloat16* p) {
  return __uint_as_float(static_cast<uint32_t>(p->bits) << 16);
}

__device__ __forceinline__ void store1(float* p, float x) { *p = x; }
__device__ __forceinline__ void store1(double* p, double x) { *p = x; }
__device__ __forceinline__ void store1(Half* p, float x) {
  p->bits = __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ void store1(BFloat16* p, float x) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// ---------------------------------------------------------------- 16 bytes

template <class T>
__device__ __forceinline__ uint4 load_bits(const T* p) {
  return *reinterpret_cast<const uint4*>(p);
}

__device__ __forceinline__ void unpack(TypeTag<float>, uint4 bits, float (&x)[4]) {
  x[0] = __uint_as_float(bits.x);
  x[1] = __uint_as_float(bits.y);
  x[2] = __uint_as_float(bits.z);
  x[3] = __uint_as_float(bits.w);
}

__device__ __forceinline__ void unpack(TypeTag<double>, uint4 bits, double (&x)[2]) {
  x[0] = __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x));
  x[1] = __hiloint2double(static_cast<int>(bits.w), static_cast<int>(bits.z));
}

__device__ __forceinline__ void unpack(TypeTag<BFloat16>, uint4 bits, float (&x)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(TypeTag<Half>, uint4 bits, float (&x)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i])));
    x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i] >> 16)));
  }
}

__device__ __forceinline__ uint4 pack(TypeTag<float>, const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                    __float_as_uint(x[3]));
}

__device__ __forceinline__ uint4 pack(TypeTag<double>, const double (&x)[2]) {
  return make_uint4(
      static_cast<uint32_t>(__double2loint(x[0])), static_cast<uint32_t>(__double2hiint(x[0])),
      static_cast<uint32_t>(__double2loint(x[1])), static_cast<uint32_t>(__double2hiint(x[1])));
}

// Two floats to 16 bits each in one instruction; the first is the lower half.
__device__ __forceinline__ uint32_t pack2(TypeTag<BFloat16>, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
__device__ __forceinline__ uint32_t pack2(TypeTag<Half>, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

template <class T>
__device__ __forceinline__ uint4 pack(TypeTag<T> tag, const float (&x)[8]) {
  return make_uint4(pack2(tag, x[0], x[1]), pack2(tag, x[2], x[3]), pack2(tag, x[4], x[5]),
                    pack2(tag, x[6], x[7]));
}

// ---------------------------------------------------------------- runs of n elements

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <int n, class T>
__device__ __forceinline__ void load_run(const T* p, AccOf<T> (&x)[n]) {
  if constexpr (n == kPack<T>) {
    if (is_aligned(p)) {
      unpack(TypeTag<T>{}, load_bits(p), x);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = load1(p + i);
}

template <int n, class T>
__device__ __forceinline__ void store_run(T* p, const AccOf<T> (&x)[n]) {
  if constexpr (n == kPack<T>) {
    if (is_aligned(p)) {
      *reinterpret_cast<uint4*>(p) = pack(TypeTag<T>{}, x);
      return;
    }
  } else if constexpr (n == 4 && sizeof(T) == 2) {  // a pack of floats written as 16 bits each
    if (reinterpret_cast<uintptr_t>(p) % 8 == 0) {
      *reinterpret_cast<uint2*>(p) =
          make_uint2(pack2(TypeTag<T>{}, x[0], x[1]), pack2(TypeTag<T>{}, x[2], x[3]));
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) store1(p + i, x[i]);
}

// ---------------------------------------------------------------- a row shared by a group of
// threads

// The group asks for as much of the row's begin and of its end as it loads in a batch: its first
// batch, while what decides about the row is itself under way, and what batches leave over.
template <int kUnroll, class T, class Group>
__device__ __forceinline__ void prefetch_row(const T* x_n, int V, const Group& group) {
  constexpr int kLine = 128 / sizeof(T);
  const int v = group.rank() * kLine;
  if (group.rank() >= kUnroll * group.size() * 16 / 128 || v >= V) return;
  prefetch_l2(x_n + v);
  prefetch_l2(x_n + (V - 1 - v));
}

// Elements of a row at most: an int holds its length and one step of a block beyond.
inline constexpr int64_t kMostElements = (int64_t{1} << 31) - (1 << 13);

// Calls f(v, step, x) until the group (at least 32 threads) has seen each element of the row x_n
// [V] once: x[u][i] is element v + u * step + i, in the accumulator type. The kUnroll loads of a
// batch are independent and issued before the first use, which is what hides the latency of memory.
// f gets kTogether of its packs at once: all, or only one where what f makes of an element needs
// the registers.
template <int kUnroll, int kTogether = kUnroll, class T, class Group, class F>
__device__ __forceinline__ void for_each_in_row(const T* x_n, int V, const Group& group, F&& f) {
  using Acc = AccOf<T>;
  static_assert(kUnroll % kTogether == 0);
  constexpr int P = kPack<T>;
  const int before =
      static_cast<int>((16 - reinterpret_cast<uintptr_t>(x_n) % 16) % 16 / sizeof(T));
  const int head = before < V ? before : V;
  const int packs = (V - head) / P;

  // Head and tail have under 2 P <= 16 elements together: one per thread.
  const int edge = group.rank() < head ? group.rank() : packs * P + group.rank();
  if (edge < V) {
    Acc x[1][1] = {{load1(x_n + edge)}};
    f(edge, 0, x);
  }

  const T* body = x_n + head;
  const int size = group.size();
  int i = group.rank();
  for (; i + (kUnroll - 1) * size < packs; i += kUnroll * size) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) bits[u] = load_bits(body + (i + u * size) * P);
#pragma unroll
    for (int first = 0; first < kUnroll; first += kTogether) {
      Acc x[kTogether][P];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) unpack(TypeTag<T>{}, bits[first + u], x[u]);
      f(head + (i + first * size) * P, size * P, x);
    }
  }

  // What is left: fewer packs per thread than a batch, of which kRest are under way together.
  constexpr int kRest = kTogether > 1 ? kTogether - 1 : 1;
  for (; i < packs; i += kRest * size) {
    uint4 bits[kRest];
#pragma unroll
    for (int u = 0; u < kRest; ++u) {
      if (i + u * size < packs) bits[u] = load_bits(body + (i + u * size) * P);
    }
#pragma unroll
    for (int u = 0; u < kRest; ++u) {
      if (i + u * size >= packs) break;
      Acc x[1][P];
      unpack(TypeTag<T>{}, bits[u], x[0]);
      f(head + (i + u * size) * P, 0, x);
    }
  }
}

}  // namespace seqkern::cuda
