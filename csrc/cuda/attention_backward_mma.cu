// Causal attention on tensor cores, backward: one kernel for dK and dV, where a block takes a tile
// of keys and walks the queries that see them, and the same kernel for dQ, where it takes a tile of
// queries and walks their keys. Each sum is one block's, in a fixed order.
//
// Rows are what the block owns (a1 and a2: K and V, or Q and dO), columns what it walks (b1 and b2:
// Q and dO, or K and V). Then x = a1 b1^T are the products q . k, y = a2 b2^T is dP, and
//   sum1 += dS b1 (dK or dQ),   sum2 += P b2 (dV).
// Derivation and layout: docs/math/attention_cuda.md.
#include "cuda/attention_mma.cuh"
#include "cuda/attention_row_stats.cuh"

namespace seqkern::cuda {
namespace {

constexpr int kThreads = 128;

// What a block sums. Warps split the rows, so P and dS stay in registers, and every fragment of
// the columns that a warp fetches should serve 32 rows: with 16 the products wait for shared
// memory. From width 128 on, the sums of dK and dV together leave no room for that.
enum class Sums { kDkDv, kDk, kDv, kDq };

template <int kWidth, Sums kSums, bool kOptions>
struct Shape {
  static constexpr bool kKeys = kSums != Sums::kDq;  // the rows are keys
  static constexpr bool kHasSum1 = kSums != Sums::kDv;
  static constexpr bool kHasSum2 = kSums == Sums::kDkDv || kSums == Sums::kDv;
  static constexpr int kRows = kWidth <= 128 ? 128 : 64;
  static constexpr int kColumns = kWidth <= 128 || !kHasSum1 ? 32 : 16;
  // Columns in registers at a time: x and y of more would not fit beside the sums of 32 rows.
  static constexpr bool kTight =
      kOptions && (kWidth == 64 ? kHasSum1 && kHasSum2 : kWidth == 128 && kHasSum1);
  static constexpr int kStep = kTight ? 16 : kColumns;
  static constexpr int M = kRows / 64;  // blocks of 16 rows per warp
  static constexpr int N = kStep / 8;   // of 8 columns
  static constexpr int O = kWidth / 8;
  static constexpr int kRowTiles = kHasSum1 ? 2 : 1;  // dV takes no V
  static constexpr unsigned kSharedBytes =
      (kRowTiles * kRows + 4 * kColumns) * kWidth * 2 + 2 * kColumns * sizeof(RowStats<float>);
};

// What is the same in every step, found once and kept in shared memory.
template <class T>
struct Fixed {
  // Of the block's own head where rows are queries, of head 0 where columns are.
  Walk<T> columns;               // b1 and b2
  const RowStats<float>* stats;  // of the segment's first query
  Scores<float, true> scores;
  float kept;  // 1 / (1 - dropout_p)
  int group;   // query heads to a key head
  TileOrder order;
  int tiles;  // of columns that each head's rows meet
};

template <class T, int kWidth, Sums kSums, bool kOptions>
class Backward {
  using S = Shape<kWidth, kSums, kOptions>;
  static constexpr bool kKeys = S::kKeys;
  using Stats = RowStats<float>;

 public:
  __device__ __forceinline__ Backward(const AttentionBackwardArgs& args, const Work& w)
      : a_(args), in_(args.in), work_(w), s_(w.segment) {
    a1_ = dynamic_shared<T>();
    a2_ = a1_ + S::kRows * kWidth;
    b_ = a1_ + S::kRowTiles * S::kRows * kWidth;
    column_stats_ = reinterpret_cast<Stats*>(b_ + 4 * S::kColumns * kWidth);
    warp_row_ = static_cast<int>(threadIdx.x) / kWarp * 16 * S::M;
    clear(sum1_);
    clear(sum2_);
    if (threadIdx.x == 0) find_fixed();
    __syncthreads();  // orders the write before every thread's reads
  }

  __device__ __forceinline__ void run() {
    // Rows that are keys meet the queries of every head of their group, one head after the other.
    const int steps = fixed().tiles * (kKeys ? fixed().group : 1);
    int head = kKeys ? work_.head * fixed().group : work_.head;
    int tile = 0, column = fixed().order.at(0) * S::kColumns;
    if (steps > 0) {
      load_rows();
      load_columns(0, head, column);
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<0>();
      // Orders this step's tiles (and the rows') before they are read, and the last step's reads
      // before its buffer is written.
      __syncthreads();
      const TileOrder order = fixed().order;
      const bool masked = tile < order.masked();
      const bool next_head = tile + 1 == fixed().tiles;
      const int next_tile = next_head ? 0 : tile + 1;
      const int next_column = order.at(next_tile) * S::kColumns;
      if (step + 1 < steps) load_columns((step + 1) % 2, head + next_head, next_column);
      if (masked) {
        // Not every warp's rows meet what the block's rows meet.
        if (band().meets(first_row(), first_row() + 16 * S::M - 1, column, column + S::kColumns))
          take<true>(step % 2, head, column);
      } else {
        take<false>(step % 2, head, column);
      }
      head += next_head;
      tile = next_tile;
      column = next_column;
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
  __device__ __forceinline__ int first_row() const { return work_.first + warp_row_; }
  __device__ __forceinline__ static Fixed<T>& fixed() { return shared<Fixed<T>>(); }

  // The segment's rows of q or dout, and of k or v.
  __device__ __forceinline__ WalkedRows<T> queries_of(const void* base, const HeadStrides& strides,
                                                      int head) const {
    // No gradient of the output is a gradient of zeros.
    return {rows_of<const T>(base ? base : in_.q, strides, in_.D, s_.b, head, s_.q_row), 0,
            base ? s_.alive : 0};
  }
  __device__ __forceinline__ WalkedRows<T> keys_of(const void* base, const HeadStrides& strides,
                                                   int head) const {
    return {rows_of<const T>(base, strides, in_.D, s_.b, head, s_.k_row), s_.key_lo, s_.length};
  }

  __device__ __forceinline__ void find_fixed() {
    Fixed<T>& f = fixed();
    const int head = kKeys ? 0 : work_.head;
    f.group = static_cast<int>(in_.NH / in_.NKV);
    if constexpr (kKeys) {
      f.columns.set(queries_of(in_.q, in_.q_strides, 0), queries_of(a_.dout, a_.dout_strides, 0),
                    kWidth);
    } else {
      f.columns.set(keys_of(in_.k, in_.k_strides, head / f.group),
                    keys_of(in_.v, in_.v_strides, head / f.group), kWidth);
    }
    f.stats = static_cast<const Stats*>(a_.workspace) + row_number(in_, s_.b, head, s_.q_row);
    f.scores = Scores<float, true>(in_, s_.b, head, kLog2E);
    f.kept = static_cast<float>(keep_scale(in_));
    f.order = TileOrder(band(), first_alive(), work_.first + work_.alive - 1, S::kColumns);
    f.tiles = work_.first + work_.alive > first_alive() ? f.order.count() : 0;
  }

  __device__ __forceinline__ void load_rows() {
    const auto load = [&](T* tile, const WalkedRows<T>& rows) {
      load_tile<kWidth, S::kRows, kThreads>(tile, rows, work_.first);
    };
    if constexpr (kKeys) {
      load(a1_, keys_of(in_.k, in_.k_strides, work_.head));
      if (S::kHasSum1) load(a2_, keys_of(in_.v, in_.v_strides, work_.head));
    } else {
      load(a1_, queries_of(in_.q, in_.q_strides, work_.head));
      load(a2_, queries_of(a_.dout, a_.dout_strides, work_.head));
      const Stats* stats = fixed().stats + work_.first;
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

  __device__ __forceinline__ void load_columns(int buffer, int head, int column) {
    T* b1 = b_ + 2 * buffer * kCopy;
    T* b2 = b1 + kCopy;
    // Read before the first copy, for reads are not moved across it: so they wait once.
    const Walk<T>& walk = fixed().columns;
    const TensorRows<const T> rows1 = walk.first.all, rows2 = walk.second.all;
    const Stats* stats = kKeys ? fixed().stats + head * in_.Tq + column : nullptr;
    const int alive = s_.alive - column;
    const int64_t before1 = kKeys ? head * in_.q_strides.h : 0;
    const int64_t before2 = kKeys ? head * a_.dout_strides.h : 0;
    if (walk.is_whole(column, S::kColumns)) {
      copy_tile<kWidth, S::kColumns, kThreads>(b1, rows1.first + before1, rows1.stride, column);
      copy_tile<kWidth, S::kColumns, kThreads>(b2, rows2.first + before2, rows2.stride, column);
    } else {
      load_tile<kWidth, S::kColumns, kThreads>(b1, walk.first, column, before1);
      load_tile<kWidth, S::kColumns, kThreads>(b2, walk.second, column, before2);
    }
    if constexpr (kKeys) {
      const int c = static_cast<int>(threadIdx.x);
      if (c < S::kColumns) {
        cp_async<8>(column_stats_ + buffer * S::kColumns + c, stats + (c < alive ? c : 0),
                    c < alive ? 8 : 0);
      }
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
      if constexpr (S::kHasSum1) {
        clear(y);
        multiply_rows<kWidth>(y, a2_, warp_row_, b2, c);
      }
      differentiate<kMask>(x, y, column_stats_ + buffer * S::kColumns + c, head, column0 + c);
      uint32_t operand[S::M][S::N / 2][4];
      if constexpr (S::kHasSum2) {
        as_operand<T>(x, operand);
        multiply_columns<kWidth>(sum2_, operand, b2, c);
      }
      if constexpr (S::kHasSum1) {
        as_operand<T>(y, operand);
        multiply_columns<kWidth>(sum1_, operand, b1, c);
      }
    }
  }

  // x: from products to P (with dropout, where kept). y: from dP to dS, without the scale; without
  // a sum of dS it is left alone.
  template <bool kMask>
  __device__ __forceinline__ void differentiate(float (&x)[S::M][S::N][4],
                                                float (&y)[S::M][S::N][4], const Stats* columns,
                                                int head, int column0) const {
    Scores<float, true> scores = fixed().scores;
    if constexpr (kOptions && kKeys) scores.take_head(in_, s_.b, head, kLog2E);
    const Dropout dropout(in_, s_, head);
    const float kept = fixed().kept;
    const int row0 = first_row();
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
          const bool is_kept = !kOptions || keep >> (4 * n + e) & 1;
          const bool is_seen =
              !kMask || (mine + column >= seen.lower(row) && mine + column < seen.upper(row));
          x[m][n][e] = is_seen && is_kept ? p : 0.0f;
          if constexpr (S::kHasSum1) {
            float dp = y[m][n][e];
            if constexpr (kOptions) dp = is_kept ? dp * kept : 0.0f;
            float ds = p * (dp - stats.delta);
            if constexpr (kOptions) ds *= derivative;
            y[m][n][e] = is_seen ? ds : 0.0f;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store() {
    T* tile2 = S::kHasSum1 ? a2_ : a1_;
    if constexpr (S::kHasSum1)
      to_tile<kWidth>(a1_, sum1_, static_cast<float>(in_.scale), warp_row_);
    if constexpr (S::kHasSum2) to_tile<kWidth>(tile2, sum2_, fixed().kept, warp_row_);
    __syncthreads();  // orders the writes before the reads of whole chunks
    const int thread = static_cast<int>(threadIdx.x);
    const auto to = [&](const T* tile, void* base, const HeadStrides& strides) {
      const int row = work_.first + (kKeys ? s_.k_row : s_.q_row);
      store_tile<kWidth>(tile, rows_of<T>(base, strides, in_.D, s_.b, work_.head, row),
                         max(0, first_alive() - work_.first), work_.rows, thread, kThreads);
    };
    if constexpr (!kKeys) to(a1_, a_.dq, a_.dq_strides);
    if constexpr (kKeys && S::kHasSum1) to(a1_, a_.dk, a_.dk_strides);
    if constexpr (S::kHasSum2) to(tile2, a_.dv, a_.dv_strides);
  }

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  const AttentionBackwardArgs& a_;
  const AttentionInputs& in_;
  const Work& work_;
  const Segment& s_;
  T* a1_;                // [kRows, kWidth]
  T* a2_;                // [kRows, kWidth], where there is a sum of dS
  T* b_;                 // [2, 2, kColumns, kWidth]: buffers of b1 and b2
  Stats* column_stats_;  // [2, kColumns]
  int warp_row_;
  float sum1_[S::kHasSum1 ? S::M : 1][S::kHasSum1 ? S::O : 1][4];
  float sum2_[S::kHasSum2 ? S::M : 1][S::kHasSum2 ? S::O : 1][4];
  Stats row_stats_[kKeys ? 1 : S::M][2];
};

template <class T, int kWidth, Sums kSums, bool kOptions>
__device__ __forceinline__ void sum_up(const AttentionBackwardArgs& a) {
  using S = Shape<kWidth, kSums, kOptions>;
  const Work& work = find_work<S::kKeys, S::kRows>(a.in);
  if (work.exists) Backward<T, kWidth, kSums, kOptions>(a, work).run();
}

// A launch over the keys, or over the queries. Where dK and dV have blocks of their own, both are
// in one launch: those of dV fill the device when those of dK run out.
template <int kWidth, bool kKeys, bool kOptions>
struct Pass {
  static constexpr bool kApart = kKeys && kWidth > 64;
  using First = Shape<kWidth, !kKeys ? Sums::kDq : kApart ? Sums::kDk : Sums::kDkDv, kOptions>;
  using Second = std::conditional_t<kApart, Shape<kWidth, Sums::kDv, kOptions>, First>;
  static_assert(First::kRows == Second::kRows);
  static constexpr unsigned kSharedBytes =
      First::kSharedBytes > Second::kSharedBytes ? First::kSharedBytes : Second::kSharedBytes;
};

template <class T, int kWidth, bool kKeys, bool kOptions>
__global__ void __launch_bounds__(kThreads)
    attention_backward_mma_kernel(const __grid_constant__ AttentionBackwardArgs a) {
  if constexpr (!kKeys) {
    sum_up<T, kWidth, Sums::kDq, kOptions>(a);
  } else if constexpr (!Pass<kWidth, kKeys, kOptions>::kApart) {
    sum_up<T, kWidth, Sums::kDkDv, kOptions>(a);
  } else if (blockIdx.y == 0) {
    sum_up<T, kWidth, Sums::kDk, kOptions>(a);
  } else {
    sum_up<T, kWidth, Sums::kDv, kOptions>(a);
  }
}

// ---------------------------------------------------------------- launching

template <class T, int kWidth, bool kKeys, bool kOptions>
void launch_pass(const AttentionBackwardArgs& a, Stream stream) {
  using P = Pass<kWidth, kKeys, kOptions>;
  const AttentionInputs& in = a.in;
  const unsigned grid = grid_of("attention_backward", in, kKeys ? in.NKV : in.NH,
                                kKeys ? in.Tk : in.Tq, P::First::kRows);
  if (grid == 0) return;
  launch(attention_backward_mma_kernel<T, kWidth, kKeys, kOptions>,
         {.name = "attention_backward",
          .grid = dim3(grid, P::kApart ? 2 : 1),
          .block = kThreads,
          .smem = P::kSharedBytes,
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
