// vec.cuh: every element of a row once, whatever its length and alignment, and 16 bytes at a time.
#include "cases.h"
#include "cuda/block.cuh"
#include "cuda/vec.cuh"

namespace seqkern::emulator {
namespace {

using cuda::kPack;

// out[v] = in[v] + 1, in_packs = elements that came in whole packs.
template <class T, int kTogether>
__global__ void add_one(const T* in, T* out, int V, int* in_packs) {
  const cuda::WarpGroup group;
  cuda::for_each_in_row<2, kTogether>(in, V, group,
                                      [&]<int U, int P>(int v, int step, AccOf<T>(&x)[U][P]) {
                                        for (int u = 0; u < U; ++u) {
                                          for (int i = 0; i < P; ++i) x[u][i] += 1;
                                          cuda::store_run(out + v + u * step, x[u]);
                                        }
                                        if (P == kPack<T>) atomicAdd(in_packs, U * P);
                                      });
}

// The input starts `before_in` elements past a 16-byte boundary, the output `before_out`.
template <class T, int kTogether>
bool row_is_right(int V, int before_in, int before_out) {
  std::vector<T> in_room(V + 2 * kPack<T> + 2), out_room(V + 2 * kPack<T> + 2);
  const auto place = [](std::vector<T>& room, int before) {
    const auto past = reinterpret_cast<uintptr_t>(room.data()) % 16 / sizeof(T);
    return room.data() + (kPack<T> - past) % kPack<T> + before;
  };
  for (T& x : out_room) cuda::store1(&x, AccOf<T>(-1));
  T* in = place(in_room, before_in);
  T* out = place(out_room, before_out);
  for (int v = 0; v < V; ++v) cuda::store1(in + v, AccOf<T>(v % 100));
  int in_packs = 0;
  cuda::launch(add_one<T, kTogether>, {.name = "case", .block = 32}, static_cast<const T*>(in), out,
               V, &in_packs);
  for (int v = 0; v < V; ++v) {
    if (cuda::load1(out + v) != AccOf<T>(v % 100 + 1)) return false;
  }
  const bool nothing_beyond =
      cuda::load1(out + V) == -1 && (out == out_room.data() || cuda::load1(out - 1) == -1);
  return nothing_beyond && in_packs >= V - 2 * (kPack<T> - 1);
}

template <class T>
bool rows_are_right() {
  for (int before_in = 0; before_in < kPack<T>; ++before_in) {
    for (int before_out = 0; before_out < kPack<T>; ++before_out) {
      for (const int V : {1, 2, 7, 8, 9, 31, 257, 1031}) {
        if (!row_is_right<T, 1>(V, before_in, before_out)) return false;
        if (!row_is_right<T, 2>(V, before_in, before_out)) return false;
      }
    }
  }
  return true;
}

}  // namespace

std::vector<Case> row_cases() {
  return {
      {"rows_float32", rows_are_right<float>},
      {"rows_float64", rows_are_right<double>},
      {"rows_float16", rows_are_right<Half>},
      {"rows_bfloat16", rows_are_right<BFloat16>},
  };
}

}  // namespace seqkern::emulator
