// Causal attention without tensor cores: every element type on every GPU. A warp takes a few rows;
// a lane a column for the products, and every 32nd element of the width for the sums.
#include "cuda/attention.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxWidth = 256;
constexpr int kSlices = kMaxWidth / kWarp;
constexpr int kForwardRows = 4;   // of a warp
constexpr int kBackwardRows = 2;  // which has two sums per row

// Rows [from, to) of a tensor from `first` on; the others count as zeros.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  int from, to;

  __device__ __forceinline__ AccOf<T> at(int row, int d) const {
    return row >= from && row < to ? load1(first + row * stride + d) : AccOf<T>(0);
  }
};

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const void* base, const HeadStrides& s, int b, int h,
                                           int row, int from, int to) {
  return {static_cast<const T*>(base) + offset_of(s, b, h, row), s.t, from, to};
}

template <class Acc, int R>
struct Scratch {
  Acc a[kWarps * R][kWarp];
  Acc b[kWarp][kWarp + 1];  // a lane reads its own row: the odd pitch spreads them over the banks
  Acc weight[kWarps * R][kWarp];
};

// dot[r] = row r of the warp's R rows of a, times row `lane` of b.
template <int R, class T>
__device__ __forceinline__ void multiply(AccOf<T> (&dot)[R], const Rows<T>& a, const Rows<T>& b,
                                         int D) {
  using Acc = AccOf<T>;
  Scratch<Acc, R>& s = shared<Scratch<Acc, R>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int r = 0; r < R; ++r) dot[r] = 0;
  for (int d0 = 0; d0 < D; d0 += kWarp) {
    const int width = min(kWarp, D - d0);
    __syncthreads();  // orders the last slice's reads before the writes
    if (lane < width) {
      for (int row = warp; row < kWarps * R; row += kWarps) s.a[row][lane] = a.at(row, d0 + lane);
      for (int row = warp; row < kWarp; row += kWarps) s.b[row][lane] = b.at(row, d0 + lane);
    }
    __syncthreads();  // orders the writes before the reads
    Acc part[R] = {};
    for (int d = 0; d < width; ++d) {
#pragma unroll
      for (int r = 0; r < R; ++r) part[r] = fma(s.a[warp * R + r][d], s.b[lane][d], part[r]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) dot[r] += part[r];
  }
}

// sum[r][u] = sum[r][u] * decay[r] + sum_c weight[r] of lane c * b[c][32 u + lane]
template <int R, class T>
__device__ __forceinline__ void accumulate(AccOf<T> (&sum)[R][kSlices], const AccOf<T> (&decay)[R],
                                           const AccOf<T> (&weight)[R], const Rows<T>& b, int D) {
  using Acc = AccOf<T>;
  Scratch<Acc, R>& s = shared<Scratch<Acc, R>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  __syncwarp();  // orders the lanes' reads of earlier weights before the writes
#pragma unroll
  for (int r = 0; r < R; ++r) s.weight[warp * R + r][lane] = weight[r];
  __syncwarp();  // orders the writes before the other lanes' reads
#pragma unroll
  for (int u = 0; u < kSlices; ++u) {
    const int d = u * kWarp + lane;
    if (d >= D) continue;
    Acc part[R] = {};
    for (int c = max(0, b.from); c < min(kWarp, b.to); ++c) {
      const Acc x = load1(b.first + c * b.stride + d);
#pragma unroll
      for (int r = 0; r < R; ++r) part[r] = fma(s.weight[warp * R + r][c], x, part[r]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r][u] = sum[r][u] * decay[r] + part[r];
  }
}

template <class T>
__device__ __forceinline__ void store(void* base, const HeadStrides& s, int b, int h, int row,
                                      const AccOf<T> (&sum)[kSlices], AccOf<T> factor, int D) {
  T* to = static_cast<T*>(base) + offset_of(s, b, h, row);
#pragma unroll
  for (int u = 0; u < kSlices; ++u) {
    const int d = u * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    if (d < D) store1(to + d, sum[u] * factor);
  }
}

struct Max {
  template <class Acc>
  __device__ __forceinline__ Acc operator()(Acc a, Acc b) const {
    return max_of(a, b);
  }
};
struct Add {
  template <class Acc>
  __device__ __forceinline__ Acc operator()(Acc a, Acc b) const {
    return a + b;
  }
};

// ---------------------------------------------------------------- forward

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_simt_kernel(const __grid_constant__ AttentionForwardArgs a) {
  using Acc = AccOf<T>;
  constexpr int R = kForwardRows;
  const AttentionInputs& in = a.in;
  const Work& work = find_work<false, kWarps * R>(in);
  if (!work.exists) return;
  const Segment& s = work.segment;
  const int h = work.head;
  const int h_kv = h / static_cast<int>(in.NH / in.NKV);
  const int D = static_cast<int>(in.D);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * R;
  const Scores<Acc, false> scores(in, s.b, h, Acc(1));
  const Dropout dropout(in, s, h);
  const Band band = band_of<false>(s, window_of(in));
  const TileOrder order(band, work.first, work.first + work.alive - 1, kWarp);
  const int end = work.alive > 0 ? order.end : order.begin;
  const Rows<T> q = rows_of<T>(in.q, in.q_strides, s.b, h, s.q_row + work.first, 0, work.alive);

  Acc row_max[R], row_sum[R] = {}, out[R][kSlices] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) row_max[r] = -infinity<Acc>();

  for (int tile = order.begin; tile < end; ++tile) {
    const int j0 = tile * kWarp;
    const int j = j0 + lane;
    const auto keys = [&](const void* base, const HeadStrides& strides) {
      return rows_of<T>(base, strides, s.b, h_kv, s.k_row + j0, s.key_lo - j0, s.length - j0);
    };
    Acc x[R], decay[R];
    multiply(x, q, keys(in.k, in.k_strides), D);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = work.first + warp_row + r;
      const bool seen = j >= band.lower(i) && j < band.upper(i);
      const Acc score = seen ? scores.of(x[r], i + s.offset - j) : -infinity<Acc>();
      const Acc now = max_of(row_max[r], warp_reduce(score, Max{}));
      // Nothing seen yet: a finite stand-in, for -inf - -inf is NaN.
      const Acc shift = now == -infinity<Acc>() ? Acc(0) : now;
      decay[r] = softmax_exp(row_max[r] - shift);
      row_max[r] = now;
      x[r] = softmax_exp(score - shift);
      row_sum[r] = row_sum[r] * decay[r] + x[r];
      if (dropout.on && !(dropout.keep(i, j / 4) >> j % 4 & 1)) x[r] = 0;
    }
    accumulate(out, decay, x, keys(in.v, in.v_strides), D);
  }

  Acc* lse = static_cast<Acc*>(a.lse) + row_number(in, s.b, h, s.q_row + work.first);
  const Acc kept = static_cast<Acc>(keep_scale(in));
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Acc sum = warp_reduce(row_sum[r], Add{});
    if (warp_row + r >= work.rows) continue;
    const bool empty = warp_row + r >= work.alive || sum == 0;
    if (empty) {
#pragma unroll
      for (int u = 0; u < kSlices; ++u) out[r][u] = 0;
    }
    store<T>(a.out, a.out_strides, s.b, h, s.q_row + work.first + warp_row + r, out[r],
             empty ? Acc(0) : kept / sum, D);
    if (lane == 0) lse[warp_row + r] = empty ? -infinity<Acc>() : log_sum(row_max[r], Acc(1), sum);
  }
}

// ---------------------------------------------------------------- backward

// A thread per row, in the order of multiply().
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_row_stats_simt_kernel(const __grid_constant__ AttentionBackwardArgs a) {
  using Acc = AccOf<T>;
  const AttentionInputs& in = a.in;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= in.B * in.NH * in.Tq) return;
  const int b = static_cast<int>(n / (in.NH * in.Tq));
  const int h = static_cast<int>(n / in.Tq % in.NH);
  const int t = static_cast<int>(n % in.Tq);
  const int D = static_cast<int>(in.D);
  const Acc lse = static_cast<const Acc*>(a.lse)[n];
  const bool empty = lse == -infinity<Acc>();
  Acc delta = 0;
  if (a.dout && !empty) {
    const T* out = static_cast<const T*>(a.out) + offset_of(a.out_strides, b, h, t);
    const T* dout = static_cast<const T*>(a.dout) + offset_of(a.dout_strides, b, h, t);
    for (int d0 = 0; d0 < D; d0 += kWarp) {
      Acc part = 0;
      for (int d = d0; d < min(D, d0 + kWarp); ++d)
        part = fma(load1(out + d), load1(dout + d), part);
      delta += part;
    }
  }
  static_cast<RowStats<Acc>*>(a.workspace)[n] = {empty ? infinity<Acc>() : lse, delta};
}

// kKeys: rows are keys, columns the queries of all heads of the group, sums dK and dV; else rows
// are queries, columns keys, the sum dQ.
template <class T, bool kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_simt_kernel(const __grid_constant__ AttentionBackwardArgs a) {
  using Acc = AccOf<T>;
  constexpr int R = kBackwardRows;
  const AttentionInputs& in = a.in;
  const Work& work = find_work<kKeys, kWarps * R>(in);
  if (!work.exists) return;
  const Segment& s = work.segment;
  const int group = static_cast<int>(in.NH / in.NKV);
  const int D = static_cast<int>(in.D);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row0 = work.first + static_cast<int>(threadIdx.x) / kWarp * R;
  const int first_alive = kKeys ? max(work.first, s.key_lo) : work.first;
  const Band band = band_of<kKeys>(s, window_of(in));
  const TileOrder order(band, first_alive, work.first + work.alive - 1, kWarp);
  const int end = work.first + work.alive > first_alive ? order.end : order.begin;
  const Acc kept = static_cast<Acc>(keep_scale(in));
  const Acc no_decay[R] = {1, 1};

  // Rows of q or dout, or of k or v, from row `row` of the segment on.
  const auto queries = [&](const void* base, const HeadStrides& strides, int h, int row) {
    return rows_of<T>(base ? base : in.q, strides, s.b, h, s.q_row + row, 0,
                      base ? s.alive - row : 0);
  };
  const auto keys = [&](const void* base, const HeadStrides& strides, int h, int row) {
    return rows_of<T>(base, strides, s.b, h, s.k_row + row, s.key_lo - row, s.length - row);
  };

  Acc sum1[R][kSlices] = {}, sum2[kKeys ? R : 1][kSlices] = {};
  Acc row_sum[R] = {};  // of p, which is 1 but for the rounding of lse: as large as lse is
  const int first_head = kKeys ? work.head * group : work.head;
  for (int h = first_head; h < first_head + (kKeys ? group : 1); ++h) {
    const int h_kv = kKeys ? work.head : h / group;
    const Scores<Acc, false> scores(in, s.b, h, Acc(1));
    const Dropout dropout(in, s, h);
    const int64_t first_query = row_number(in, s.b, h, s.q_row);
    const RowStats<Acc>* stats = static_cast<const RowStats<Acc>*>(a.workspace) + first_query;
    const Acc* dlse = a.dlse ? static_cast<const Acc*>(a.dlse) + first_query : nullptr;
    for (int tile = order.begin; tile < end; ++tile) {
      const int column0 = tile * kWarp;
      const int column = column0 + lane;
      const int q0 = kKeys ? column0 : work.first, k0 = kKeys ? work.first : column0;
      const Rows<T> q = queries(in.q, in.q_strides, h, q0);
      const Rows<T> dout = queries(a.dout, a.dout_strides, h, q0);
      const Rows<T> k = keys(in.k, in.k_strides, h_kv, k0);
      const Rows<T> v = keys(in.v, in.v_strides, h_kv, k0);
      Acc p[R], ds[R];
      multiply(p, kKeys ? k : q, kKeys ? q : k, D);
      multiply(ds, kKeys ? v : dout, kKeys ? dout : v, D);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int row = row0 + r;
        const int i = kKeys ? column : row, j = kKeys ? row : column;
        const bool seen = row >= first_alive && row < work.first + work.alive &&
                          column >= band.lower(row) && column < band.upper(row);
        if (!seen) {
          p[r] = ds[r] = 0;
          continue;
        }
        Acc derivative;
        const RowStats<Acc> of_row = stats[i];
        const Acc score = scores.of(p[r], i + s.offset - j, derivative);
        p[r] = softmax_exp(score - of_row.lse);
        row_sum[r] += p[r];
        const bool keep = !dropout.on || (dropout.keep(i, j / 4) >> j % 4 & 1);
        ds[r] = (keep ? ds[r] * kept : Acc(0)) - of_row.delta;
        if (dlse) ds[r] += dlse[i];
        ds[r] *= p[r] * derivative;
        if (!keep) p[r] = 0;
      }
      if constexpr (kKeys) accumulate(sum2, no_decay, p, dout, D);
      accumulate(sum1, no_decay, ds, kKeys ? q : k, D);
    }
  }

  const Acc scale = static_cast<Acc>(in.scale);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = row0 + r;
    const Acc whole = kKeys ? Acc(1) : warp_reduce(row_sum[r], Add{});
    if (row < first_alive || row >= work.first + work.rows) continue;
    if constexpr (kKeys) {
      store<T>(a.dk, a.dk_strides, s.b, work.head, s.k_row + row, sum1[r], scale, D);
      store<T>(a.dv, a.dv_strides, s.b, work.head, s.k_row + row, sum2[r], kept, D);
    } else {
      store<T>(a.dq, a.dq_strides, s.b, work.head, s.q_row + row, sum1[r],
               whole == 0 ? scale : scale / whole, D);
    }
  }
}

}  // namespace

// ---------------------------------------------------------------- launchers

void attention_forward_simt(const AttentionForwardArgs& a, Stream stream) {
  const unsigned grid = grid_of("attention", a.in, a.in.NH, a.in.Tq, kWarps * kForwardRows);
  if (grid == 0) return;
  dispatch_dtype(a.in.dtype, [&]<class T>(TypeTag<T>) {
    launch(attention_forward_simt_kernel<T>,
           {.name = "attention", .grid = grid, .block = kThreads, .stream = stream}, a);
  });
}

void attention_backward_simt(const AttentionBackwardArgs& a, Stream stream) {
  const AttentionInputs& in = a.in;
  dispatch_dtype(in.dtype, [&]<class T>(TypeTag<T>) {
    const auto pass = [&](auto kernel, int64_t heads, int64_t rows) {
      const unsigned grid = grid_of("attention_backward", in, heads, rows, kWarps * kBackwardRows);
      if (grid == 0) return;
      launch(kernel,
             {.name = "attention_backward", .grid = grid, .block = kThreads, .stream = stream}, a);
    };
    const int64_t blocks = ceil_div<int64_t>(in.B * in.NH * in.Tq, kThreads);
    if (blocks > 0) {
      // No more blocks than the pass over the queries, whose number is checked below.
      launch(attention_row_stats_simt_kernel<T>,
             {.name = "attention_backward",
              .grid = static_cast<unsigned>(blocks),
              .block = kThreads,
              .stream = stream},
             a);
    }
    pass(attention_backward_simt_kernel<T, true>, in.NKV, in.Tk);
    pass(attention_backward_simt_kernel<T, false>, in.NH, in.Tq);
  });
}

void visit_attention_simt_kernels(VisitKernel visit, void* context) {
  const auto of_type = [&]<class T>(TypeTag<T>, const std::string& dtype) {
    const auto name = [&](const std::string& kernel) { return kernel + "<" + dtype + ">"; };
    visit(context, name("attention_forward_simt").c_str(),
          reinterpret_cast<const void*>(attention_forward_simt_kernel<T>));
    visit(context, name("attention_row_stats_simt").c_str(),
          reinterpret_cast<const void*>(attention_row_stats_simt_kernel<T>));
    visit(context, name("attention_backward_simt_dkdv").c_str(),
          reinterpret_cast<const void*>(attention_backward_simt_kernel<T, true>));
    visit(context, name("attention_backward_simt_dq").c_str(),
          reinterpret_cast<const void*>(attention_backward_simt_kernel<T, false>));
  };
  of_type(TypeTag<float>{}, "float32");
  of_type(TypeTag<double>{}, "float64");
  of_type(TypeTag<Half>{}, "float16");
  of_type(TypeTag<BFloat16>{}, "bfloat16");
}

}  // namespace seqkern::cuda
