// Causal attention on tensor cores, backward: one kernel for dK and dV, where a block takes a tile
// of keys and walks the queries that see them, and the same kernel for dQ, where it takes a tile of
// queries and walks their keys. Each sum is one block's, in a fixed order.
//
// Rows are what the block owns (a1 and a2: K and V, or Q and dO), columns what it walks (b1 and b2:
// Q and dO, or K and V). Then x = a1 b1^T are the products q . k, y = a2 b2^T is dP, and
//   sum1 += dS b1 (dK or dQ),   sum2 += P b2 (dV, where rows are keys).
// Derivation and layout: docs/math/attention_cuda.md.
#include "cuda/attention_mma.cuh"

namespace seqkern::cuda {
namespace {

// Warps split the rows, so P and dS stay in registers. At width 256 the two sums of a row need more
// registers than a thread has: two warps then share the rows, each with half the columns of the
// sums, and both compute x and y.
template <int kWidth, bool kKeys>
struct Shape {
  static constexpr int kRows = kWidth <= 64 ? 128 : 64;
  static constexpr int kColumns = kWidth <= 128 ? 32 : 16;
  static constexpr int kHalves = kKeys && kWidth == 256 ? 2 : 1;
  static constexpr int kThreads = 128 * kHalves;
  // Columns in registers at a time: x and y beside both sums of 32 rows would not fit.
  static constexpr int kStep = kKeys && kWidth == 64 ? 16 : kColumns;
  static constexpr int M = kRows / 64;  // blocks of 16 rows per warp
  static constexpr int N = kStep / 8;   // of 8 columns
  static constexpr int O = kWidth / 8 / kHalves;
  static constexpr unsigned kSharedBytes =
      (2 * kRows + 4 * kColumns) * kWidth * 2 + 2 * kColumns * sizeof(RowStats<float>);
};

template <class T, int kWidth, bool kKeys, bool kOptions>
class Backward {
  using S = Shape<kWidth, kKeys>;
  using Stats = RowStats<float>;

 public:
  __device__ __forceinline__ Backward(const AttentionBackwardArgs& args, const Work& w)
      : a_(args), in_(args.in), work_(w), s_(w.segment) {
    a1_ = dynamic_shared<T>();
    a2_ = a1_ + S::kRows * kWidth;
    b_ = a2_ + S::kRows * kWidth;
    column_stats_ = reinterpret_cast<Stats*>(b_ + 4 * S::kColumns * kWidth);
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    warp_row_ = warp % 4 * 16 * S::M;
    chunk_ = warp / 4 * S::O;
    clear(sum1_);
    clear(sum2_);
  }

  __device__ __forceinline__ void run() {
    const int group = static_cast<int>(in_.NH / in_.NKV);
    const TileOrder order(band(), first_alive(), work_.first + work_.alive - 1, S::kColumns);
    const int tiles = work_.first + work_.alive > first_alive() ? order.count() : 0;
    // Rows that are keys meet the queries of every head of their group, one head after the other.
    const int steps = kKeys ? tiles * group : tiles;
    if (steps > 0) {
      load_rows();
      load_columns(0, first_head(), order.at(0));
    }
    int head = first_head(), tile = 0;
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<0>();
      // Orders this step's tiles (and the rows') before they are read, and the last step's reads
      // before its buffer is written.
      __syncthreads();
      const bool next_head = tile + 1 == tiles;
      if (step + 1 < steps) {
        load_columns((step + 1) % 2, head + next_head, order.at(next_head ? 0 : tile + 1));
      }
      const int column = order.at(tile) * S::kColumns;
      if (tile < order.masked()) {
        take<true>(step % 2, head, column);
      } else {
        take<false>(step % 2, head, column);
      }
      head += next_head;
      tile = next_head ? 0 : tile + 1;
    }
    __syncthreads();  // orders all warps' reads of the rows before the sums are written over them
    store();
  }

 private:
  static constexpr int kCopy = S::kColumns * kWidth;  // elements of one tile of columns

  __device__ __forceinline__ Band band() const { return band_of<kKeys>(s_, window_of(in_)); }
  __device__ __forceinline__ int first_alive() const {
    return kKeys ? max(work_.first, s_.key_lo) : work_.first;
  }
  __device__ __forceinline__ int first_head() const {
    return kKeys ? work_.head * static_cast<int>(in_.NH / in_.NKV) : work_.head;
  }
  __device__ __forceinline__ int key_head() const {
    return kKeys ? work_.head : work_.head / static_cast<int>(in_.NH / in_.NKV);
  }

  // kRows rows of q, k, v or dout from row `row` of the segment on.
  template <int kRows>
  __device__ __forceinline__ void load(T* tile, const void* base, const HeadStrides& strides,
                                       bool keys, int head, int row) {
    load_tile<kWidth, kRows, S::kThreads>(
        tile,
        rows_of<const T>(base, strides, in_.D, s_.b, head, row + (keys ? s_.k_row : s_.q_row)),
        keys ? s_.key_lo - row : 0, (keys ? s_.length : s_.alive) - row);
  }
  // No gradient of the output is a gradient of zeros.
  template <int kRows>
  __device__ __forceinline__ void load_dout(T* tile, int head, int row) {
    const bool given = a_.dout != nullptr;
    load_tile<kWidth, kRows, S::kThreads>(
        tile,
        rows_of<const T>(given ? a_.dout : in_.q, given ? a_.dout_strides : in_.q_strides, in_.D,
                         s_.b, head, row + s_.q_row),
        0, given ? s_.alive - row : 0);
  }
  __device__ __forceinline__ const Stats* stats_of(int head, int row) const {
    return static_cast<const Stats*>(a_.workspace) + row_number(in_, s_.b, head, s_.q_row + row);
  }

  __device__ __forceinline__ void load_rows() {
    if constexpr (kKeys) {
      load<S::kRows>(a1_, in_.k, in_.k_strides, true, work_.head, work_.first);
      load<S::kRows>(a2_, in_.v, in_.v_strides, true, work_.head, work_.first);
    } else {
      load<S::kRows>(a1_, in_.q, in_.q_strides, false, work_.head, work_.first);
      load_dout<S::kRows>(a2_, work_.head, work_.first);
      const Stats* stats = stats_of(work_.head, work_.first);
#pragma unroll
      for (int m = 0; m < S::M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row_ + 16 * m + 8 * half + lane() / 4;
          row_stats_[m][half] = row < work_.alive ? stats[row] : Stats{infinity<float>(), 0};
        }
      }
    }
  }

  __device__ __forceinline__ void load_columns(int buffer, int head, int tile) {
    const int column = tile * S::kColumns;
    T* b1 = b_ + 2 * buffer * kCopy;
    if constexpr (kKeys) {
      load<S::kColumns>(b1, in_.q, in_.q_strides, false, head, column);
      load_dout<S::kColumns>(b1 + kCopy, head, column);
      const int c = static_cast<int>(threadIdx.x);
      if (c < S::kColumns) {
        const bool exists = column + c < s_.alive;
        const Stats* stats = stats_of(head, column);
        cp_async<8>(column_stats_ + buffer * S::kColumns + c, stats + (exists ? c : 0),
                    exists ? 8 : 0);
      }
    } else {
      load<S::kColumns>(b1, in_.k, in_.k_strides, true, key_head(), column);
      load<S::kColumns>(b1 + kCopy, in_.v, in_.v_strides, true, key_head(), column);
    }
    cp_async_commit();
  }

  template <bool kMask>
  __device__ __forceinline__ void take(int buffer, int head, int column0) {
    const T* b1 = b_ + 2 * buffer * kCopy;
    const T* b2 = b1 + kCopy;
#pragma unroll 1
    for (int c = 0; c < S::kColumns; c += S::kStep) {
      float x[S::M][S::N][4], y[S::M][S::N][4];
      clear(x);
      multiply_rows<kWidth>(x, a1_, warp_row_, b1, c);
      clear(y);
      multiply_rows<kWidth>(y, a2_, warp_row_, b2, c);
      differentiate<kMask>(x, y, column_stats_ + buffer * S::kColumns + c, head, column0 + c);
      uint32_t operand[S::M][S::N / 2][4];
      if constexpr (kKeys) {
        as_operand<T>(x, operand);
        multiply_columns<kWidth>(sum2_, operand, b2, c, chunk_);
      }
      as_operand<T>(y, operand);
      multiply_columns<kWidth>(sum1_, operand, b1, c, chunk_);
    }
  }

  // x: from products to P (with dropout, where kept). y: from dP to dS, without the scale.
  template <bool kMask>
  __device__ __forceinline__ void differentiate(float (&x)[S::M][S::N][4],
                                                float (&y)[S::M][S::N][4], const Stats* columns,
                                                int head, int column0) const {
    const Scores<float, true> scores(in_, s_.b, head, kLog2E);
    const Dropout dropout(in_, s_, head);
    const float kept = static_cast<float>(keep_scale(in_));
    const int row0 = work_.first + warp_row_;
    const int mine = column0 + lane() % 4 * 2;  // of the lane's columns, the first
    const Band seen = band();
#pragma unroll
    for (int m = 0; m < S::M; ++m) {
      uint32_t keep = 0xffffffffu;  // four bits per n
      if constexpr (kOptions) {
        if (dropout.on) {
          using Keep = std::conditional_t<kKeys, KeepOfKeyRows<S::N>, KeepOfQueryRows<S::N>>;
          const Keep drawn(dropout, row0 + 16 * m, column0);
          keep = 0;
#pragma unroll
          for (int n = 0; n < S::N; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
              keep |= static_cast<uint32_t>(drawn.of(n, e)) << (4 * n + e);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < S::N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = row0 + 16 * m + e / 2 * 8 + lane() / 4;
          const int column = 8 * n + e % 2;
          const Stats stats =
              kKeys ? columns[column + lane() % 4 * 2] : row_stats_[kKeys ? 0 : m][e / 2];
          float p, derivative = 1;
          if constexpr (kOptions) {
            const int apart = row - mine - column;
            const float score =
                scores.of(x[m][n][e], kKeys ? s_.offset - apart : s_.offset + apart, derivative);
            p = ex2_approx(score - stats.lse);
          } else {
            p = ex2_approx(fmaf(x[m][n][e], scores.factor, -stats.lse));
          }
          float dp = y[m][n][e];
          float p_kept = p;
          if constexpr (kOptions) {
            const bool is_kept = keep >> (4 * n + e) & 1;
            dp = is_kept ? dp * kept : 0.0f;
            p_kept = is_kept ? p : 0.0f;
          }
          float ds = p * (dp - stats.delta);
          if constexpr (kOptions) ds *= derivative;
          if (kMask && (mine + column < seen.lower(row) || mine + column >= seen.upper(row)))
            p_kept = ds = 0;
          x[m][n][e] = p_kept;
          y[m][n][e] = ds;
        }
      }
    }
  }

  __device__ __forceinline__ void store() {
    const float scale = static_cast<float>(in_.scale);
    to_tile<kWidth>(a1_, sum1_, scale, warp_row_, chunk_);
    if constexpr (kKeys)
      to_tile<kWidth>(a2_, sum2_, static_cast<float>(keep_scale(in_)), warp_row_, chunk_);
    __syncthreads();  // orders the writes before the reads of whole chunks
    const int thread = static_cast<int>(threadIdx.x);
    const auto to = [&](const T* tile, void* base, const HeadStrides& strides) {
      const int row = work_.first + (kKeys ? s_.k_row : s_.q_row);
      store_tile<kWidth>(tile, rows_of<T>(base, strides, in_.D, s_.b, work_.head, row),
                         max(0, first_alive() - work_.first), work_.rows, thread, S::kThreads);
    };
    if constexpr (kKeys) {
      to(a1_, a_.dk, a_.dk_strides);
      to(a2_, a_.dv, a_.dv_strides);
    } else {
      to(a1_, a_.dq, a_.dq_strides);
    }
  }

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  const AttentionBackwardArgs& a_;
  const AttentionInputs& in_;
  const Work& work_;
  const Segment& s_;
  T* a1_;                // [kRows, kWidth]
  T* a2_;                // [kRows, kWidth]
  T* b_;                 // [2, 2, kColumns, kWidth]: buffers of b1 and b2
  Stats* column_stats_;  // [2, kColumns]
  int warp_row_;
  int chunk_;  // first column of the warp's sums, in chunks
  float sum1_[S::M][S::O][4];
  float sum2_[kKeys ? S::M : 1][kKeys ? S::O : 1][4];
  Stats row_stats_[kKeys ? 1 : S::M][2];
};

template <class T, int kWidth, bool kKeys, bool kOptions>
__global__ void __launch_bounds__(Shape<kWidth, kKeys>::kThreads)
    attention_backward_mma_kernel(const __grid_constant__ AttentionBackwardArgs a) {
  const Work& work = find_work<kKeys, Shape<kWidth, kKeys>::kRows>(a.in);
  if (!work.exists) return;
  Backward<T, kWidth, kKeys, kOptions>(a, work).run();
}

// ---------------------------------------------------------------- row statistics

constexpr int kStatsRows = 64;
constexpr int kStatsThreads = 128;

// delta is the diagonal of dout out^T, by the products that make dP of dout v^T.
template <class T, int kWidth>
__global__ void __launch_bounds__(kStatsThreads)
    attention_row_stats_mma_kernel(const __grid_constant__ AttentionBackwardArgs a) {
  const AttentionInputs& in = a.in;
  const int tiles = ceil_div(static_cast<int>(in.Tq), kStatsRows);
  const int block = static_cast<int>(blockIdx.x);
  const int t0 = block % tiles * kStatsRows;
  const int h = block / tiles % static_cast<int>(in.NH);
  const int b = block / tiles / static_cast<int>(in.NH);
  const int rows = min(kStatsRows, static_cast<int>(in.Tq) - t0);
  T* dout_tile = dynamic_shared<T>();
  T* out_tile = dout_tile + kStatsRows * kWidth;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16;
  float x[1][2][4];
  clear(x);
  if (a.dout) {
    load_tile<kWidth, kStatsRows, kStatsThreads>(
        dout_tile, rows_of<const T>(a.dout, a.dout_strides, in.D, b, h, t0), 0, rows);
    load_tile<kWidth, kStatsRows, kStatsThreads>(
        out_tile, rows_of<const T>(a.out, a.out_strides, in.D, b, h, t0), 0, rows);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // orders the copies before the other threads' reads
    multiply_rows<kWidth>(x, dout_tile, warp_row, out_tile, warp_row);
  }
  // Lane 4 g + g / 2 holds row g's and row g + 8's elements of the diagonal.
  const int g = lane / 4;
  if (lane % 4 != g / 2) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + 8 * half + g;
    if (row >= rows) continue;
    const int64_t n = row_number(in, b, h, t0 + row);
    const float lse = static_cast<const float*>(a.lse)[n];
    const bool empty = lse == -infinity<float>();
    const float diagonal = g % 2 ? x[0][half][2 * half + 1] : x[0][half][2 * half];
    const float dlse = a.dlse ? static_cast<const float*>(a.dlse)[n] : 0.0f;
    static_cast<RowStats<float>*>(a.workspace)[n] = {empty ? infinity<float>() : lse * kLog2E,
                                                     empty ? 0.0f : diagonal - dlse};
  }
}

// ---------------------------------------------------------------- launching

template <class T, int kWidth>
void launch_row_stats(const AttentionBackwardArgs& a, Stream stream) {
  const int64_t blocks = a.in.B * a.in.NH * ceil_div<int64_t>(a.in.Tq, kStatsRows);
  if (blocks == 0) return;
  // No more blocks than the pass over the queries, whose number is checked.
  launch(attention_row_stats_mma_kernel<T, kWidth>,
         {.name = "attention_backward",
          .grid = static_cast<unsigned>(blocks),
          .block = kStatsThreads,
          .smem = 2 * kStatsRows * kWidth * sizeof(T),
          .stream = stream},
         a);
}

template <class T, int kWidth, bool kKeys, bool kOptions>
void launch_pass(const AttentionBackwardArgs& a, Stream stream) {
  using S = Shape<kWidth, kKeys>;
  const AttentionInputs& in = a.in;
  const unsigned grid =
      grid_of("attention_backward", in, kKeys ? in.NKV : in.NH, kKeys ? in.Tk : in.Tq, S::kRows);
  if (grid == 0) return;
  launch(attention_backward_mma_kernel<T, kWidth, kKeys, kOptions>,
         {.name = "attention_backward",
          .grid = grid,
          .block = S::kThreads,
          .smem = S::kSharedBytes,
          .stream = stream},
         a);
}

}  // namespace

// ---------------------------------------------------------------- launcher

void attention_backward_mma(const AttentionBackwardArgs& a, Stream stream) {
  specialize_mma(a.in,
                 [&]<class T, int kWidth, class Options>(TypeTag<T>, Constant<kWidth>, Options) {
                   launch_row_stats<T, kWidth>(a, stream);
                   launch_pass<T, kWidth, true, Options::value>(a, stream);
                   launch_pass<T, kWidth, false, Options::value>(a, stream);
                 });
}

void visit_attention_backward_mma_kernels(VisitKernel visit, void* context) {
  for_each_mma([&]<class T, int kWidth, class Options>(TypeTag<T>, Constant<kWidth>, Options,
                                                       const std::string& options) {
    if (!Options::value) {
      visit(context, ("attention_row_stats_mma" + options).c_str(),
            reinterpret_cast<const void*>(attention_row_stats_mma_kernel<T, kWidth>));
    }
    visit(context, ("attention_backward_mma_dkdv" + options).c_str(),
          reinterpret_cast<const void*>(
              attention_backward_mma_kernel<T, kWidth, true, Options::value>));
    visit(context, ("attention_backward_mma_dq" + options).c_str(),
          reinterpret_cast<const void*>(
              attention_backward_mma_kernel<T, kWidth, false, Options::value>));
  });
}

}  // namespace seqkern::cuda
