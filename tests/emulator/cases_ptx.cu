// The instructions of ptx.cuh.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <random>

#include "cases.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vec.cuh"

namespace seqkern::emulator {
namespace {

using cuda::launch;
using cuda::shared;

// ---------------------------------------------------------------- matrix product

template <class T>
struct alignas(16) Tiles {
  T a[16][16];
  T b[16][8];  // [k, n]: ldmatrix transposes it into the column-major operand
};

// d [16, 8] = a [16, 16] b [16, 8] + c, through shared memory, ldmatrix and mma.sync, by one warp.
template <class T>
__global__ void product(const T* a, const T* b, const float* c, float* d) {
  Tiles<T>& s = shared<Tiles<T>>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) s.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) s.b[i / 8][i % 8] = b[i];
  __syncwarp();  // orders the tiles' writes before ldmatrix reads other lanes' rows
  uint32_t a_fragment[4], b_fragment[2];
  cuda::ldmatrix<false>(a_fragment, &s.a[lane % 16][lane / 16 * 8]);
  cuda::ldmatrix<true>(b_fragment, &s.b[lane % 16][0]);
  const int row = lane / 4, column = lane % 4 * 2;
  const float from[4] = {c[row * 8 + column], c[row * 8 + column + 1], c[(row + 8) * 8 + column],
                         c[(row + 8) * 8 + column + 1]};
  float to[4];
  cuda::mma_m16n8k16<T>(to, a_fragment, b_fragment, from);
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = to[i];
}

template <class T>
bool product_is_right() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<T> a(16 * 16), b(16 * 8);
  std::vector<float> c(16 * 8), d(16 * 8, -1.0f);
  for (T& x : a) cuda::store1(&x, normal(random));
  for (T& x : b) cuda::store1(&x, normal(random));
  for (float& x : c) x = normal(random);
  launch(product<T>, {.name = "case", .block = 32}, a.data(), b.data(), c.data(), d.data());
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double want = c[m * 8 + n];
      for (int k = 0; k < 16; ++k)
        want += double(cuda::load1(&a[m * 16 + k])) * cuda::load1(&b[k * 8 + n]);
      if (d[m * 8 + n] != static_cast<float>(want)) return false;
    }
  }
  return true;
}

// ---------------------------------------------------------------- ldmatrix

struct alignas(16) Matrices {
  uint16_t x[4][8][8];
};

template <bool kTranspose, int kMatrices>
__global__ void load_matrices(int* ok) {
  Matrices& s = shared<Matrices>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 4 * 64; i += 32) s.x[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
  __syncwarp();  // orders the writes before ldmatrix reads other lanes' rows
  uint32_t bits[kMatrices];
  cuda::ldmatrix<kTranspose>(bits, &s.x[lane / 8][lane % 8][0]);
  ok[lane] = 1;
  for (int j = 0; j < kMatrices; ++j) {
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4, column = lane % 4 * 2 + i;
      const int want = j * 64 + (kTranspose ? column * 8 + row : row * 8 + column);
      if (static_cast<int>(bits[j] >> 16 * i & 0xffff) != want) ok[lane] = 0;
    }
  }
}

__global__ void load_misaligned_matrix(int* ok) {
  Matrices& s = shared<Matrices>();
  uint32_t bits[1];
  cuda::ldmatrix<false>(bits, &s.x[0][0][1]);
  ok[threadIdx.x] = static_cast<int>(bits[0]);
}

bool all_ok(void (*kernel)(int*)) {
  std::vector<int> ok(32, 0);
  launch(kernel, {.name = "case", .block = 32}, ok.data());
  return ok == std::vector<int>(32, 1);
}

// ---------------------------------------------------------------- cp.async

constexpr int kStages = 3;
constexpr int kThreads = 32;

template <class X>
struct Stages {
  X x[kStages][kThreads];
};

enum class Wrong { kNothing, kNoWait, kWaitTooFew, kNoBarrier };

// Sums a row of stages that arrive in the background, reading the neighbour's copies.
struct alignas(16) Pair {
  double x = 0, y = 0;
  Pair() = default;
  explicit Pair(int v) : x(v), y(2 * v) {}
  Pair& operator+=(const Pair& other) {
    x += other.x;
    y += other.y;
    return *this;
  }
  bool operator==(const Pair&) const = default;
};

template <class X, Wrong kWrong>
__global__ void pipeline(const X* in, X* out, int V) {
  Stages<X>& s = shared<Stages<X>>();
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < kStages; ++i) {
    const int v = i * kThreads + t;
    cuda::cp_async<sizeof(X)>(&s.x[i][t], in + (v < V ? v : 0),
                              v < V ? static_cast<int>(sizeof(X)) : 0);
    cuda::cp_async_commit();
  }
  X sum = {};
  for (int i = 0; i < kStages; ++i) {
    if (kWrong == Wrong::kWaitTooFew) {
      cuda::cp_async_wait<kStages - 1>();  // enough for the first stage only
    } else if (kWrong != Wrong::kNoWait) {
      cuda::cp_async_wait<0>();
    }
    if (kWrong != Wrong::kNoBarrier)
      __syncthreads();  // orders this thread's copies before the others' reads
    sum += s.x[i][(t + 1) % kThreads];
  }
  out[t] = sum;
}

template <class X, Wrong kWrong = Wrong::kNothing>
bool pipeline_is_right() {
  const int V = kStages * kThreads - 5;  // the last copies fill with zeros
  alignas(16) X in[kStages * kThreads];
  std::vector<X> out(kThreads, X(-1));
  for (int v = 0; v < kStages * kThreads; ++v) in[v] = X(v + 1);
  launch(pipeline<X, kWrong>, {.name = "case", .block = kThreads}, static_cast<const X*>(in),
         out.data(), V);
  for (int t = 0; t < kThreads; ++t) {
    X want(0);
    for (int i = 0; i < kStages; ++i) {
      const int v = i * kThreads + (t + 1) % kThreads;
      want += v < V ? in[v] : X(0);
    }
    if (!(out[t] == want)) return false;
  }
  return true;
}

// ---------------------------------------------------------------- scalars

bool ex2() {
  return cuda::ex2_approx(3.0f) == 8.0f && cuda::ex2_approx(-127.0f) == 0.0f &&
         cuda::ex2_approx(-126.0f) > 0.0f && std::isnan(cuda::ex2_approx(std::nanf(""))) &&
         cuda::ex2_approx(-std::numeric_limits<float>::infinity()) == 0.0f;
}

bool rcp() {
  const float inf = std::numeric_limits<float>::infinity();
  return cuda::rcp_approx(4.0f) == 0.25f && cuda::rcp_approx(inf) == 0.0f &&
         cuda::rcp_approx(0x1p127f) == 0.0f && std::isnan(cuda::rcp_approx(std::nanf("")));
}

// Every 16-bit pattern back from the float it stands for, and floats between neighbours to the even
// one.
template <class T>
bool conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T x{static_cast<uint16_t>(bits)};
    const float f = cuda::load1(&x);
    T back{};
    cuda::store1(&back, f);
    if (std::isnan(f) ? !std::isnan(cuda::load1(&back)) : back.bits != x.bits) return false;
    const T next{static_cast<uint16_t>(bits + 1)};
    const float g = cuda::load1(&next);
    if (std::isnan(f) || !std::isfinite(g) || bits == 0x7fff || bits == 0xffff) continue;
    cuda::store1(&back, static_cast<float>((double(f) + g) / 2));
    if (back.bits != (bits % 2 == 0 ? x.bits : next.bits)) return false;
  }
  return true;
}

}  // namespace

std::vector<Case> ptx_cases() {
  return {
      {"mma_bfloat16", product_is_right<BFloat16>},
      {"mma_float16", product_is_right<Half>},
      {"ldmatrix_x1", [] { return all_ok(load_matrices<false, 1>); }},
      {"ldmatrix_x2", [] { return all_ok(load_matrices<false, 2>); }},
      {"ldmatrix_x4", [] { return all_ok(load_matrices<false, 4>); }},
      {"ldmatrix_x1_transposed", [] { return all_ok(load_matrices<true, 1>); }},
      {"ldmatrix_x2_transposed", [] { return all_ok(load_matrices<true, 2>); }},
      {"ldmatrix_x4_transposed", [] { return all_ok(load_matrices<true, 4>); }},
      {"ldmatrix_misaligned", [] { return all_ok(load_misaligned_matrix); }},
      {"cp_async_4", [] { return pipeline_is_right<float>(); }},
      {"cp_async_8", [] { return pipeline_is_right<double>(); }},
      {"cp_async_16", [] { return pipeline_is_right<Pair>(); }},
      {"cp_async_without_wait", [] { return pipeline_is_right<float, Wrong::kNoWait>(); }},
      {"cp_async_waits_too_few", [] { return pipeline_is_right<float, Wrong::kWaitTooFew>(); }},
      {"cp_async_without_barrier", [] { return pipeline_is_right<float, Wrong::kNoBarrier>(); }},
      {"ex2", ex2},
      {"rcp", rcp},
      {"conversions_float16", conversions<Half>},
      {"conversions_bfloat16", conversions<BFloat16>},
  };
}

}  // namespace seqkern::emulator
