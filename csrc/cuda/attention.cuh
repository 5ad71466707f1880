// What the kernels of causal attention share: where a block works, which keys a query sees, how a
// product becomes a score, dropout, and what a row's softmax leaves for the backward.
#pragma once

#include <climits>
#include <string>

#include "common/errors.h"
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/vec.cuh"
#include "ops/attention.h"

namespace seqkern::cuda {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.693147180559945309417f;

template <class Acc>
__device__ __forceinline__ constexpr Acc infinity() {
  return static_cast<Acc>(__builtin_inff());
}

// ---------------------------------------------------------------- segments

// One sequence, as a block sees it. Queries are counted from the segment's first. Keys are counted
// from a tensor row that is a multiple of four, so that the four keys of one dropout draw are four
// neighbours of one tile, wherever a packed sequence begins.
struct Segment {
  int b;        // batch row of the tensors
  int q_row;    // tensor row of query 0
  int k_row;    // tensor row of key 0
  int queries;  // queries [0, queries) are in the tensors,
  int alive;    // and [0, alive) of them are no padding
  int key_lo;   // keys [key_lo, keys) are in the tensors,
  int keys;
  int length;  // and [key_lo, length) of them are no padding
  int offset;  // query i stands at key i + offset
};

// The block's tile of queries or keys of one head.
struct Work {
  Segment segment;
  int exists;  // upper bounds of the grid leave blocks over
  int head;    // of the heads the grid was made for: query heads, or key heads
  int first;   // row of the segment
  int rows;    // of the tile that are in the tensors
  int alive;   // and that are no padding
};

__device__ __forceinline__ int clamped(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

__device__ __forceinline__ Segment batch_segment(const AttentionInputs& in, int b) {
  const int Tq = static_cast<int>(in.Tq), Tk = static_cast<int>(in.Tk);
  Segment s = {};
  s.b = b;
  s.queries = Tq;
  s.keys = Tk;
  s.length = in.lengths ? clamped(in.lengths[b], 0, Tk) : Tk;
  s.offset = Tk - Tq;
  s.alive = clamped(int64_t{s.length} - s.offset, 0, Tq);
  return s;
}

// Where part n of the packed tokens begins: part 0 is what precedes the first sequence, part S + 1
// what follows the last one; both are padding. The clamp keeps what cannot be checked without
// waiting for the device from becoming an access outside the tensors.
__device__ __forceinline__ int part_begin(const AttentionInputs& in, int n) {
  if (n == 0) return 0;
  const int T = static_cast<int>(in.Tq);
  return n > in.S + 1 ? T : clamped(in.cu_seqlens[n - 1], 0, T);
}

__device__ __forceinline__ Segment packed_segment(const AttentionInputs& in, int n) {
  const int begin = part_begin(in, n);
  const int end = max(begin, part_begin(in, n + 1));
  const bool padding = n == 0 || n > in.S;
  const int shift = begin % 4;
  Segment s = {};
  s.q_row = begin;
  s.k_row = begin - shift;
  s.queries = end - begin;
  s.alive = padding ? 0 : s.queries;
  s.key_lo = shift;
  s.keys = shift + s.queries;
  s.length = padding ? shift : s.keys;
  s.offset = shift;
  return s;
}

// Tiles a head needs at most. Packed: part n owns the numbers from part_begin(n) / tile + n up to
// the next part's. That is enough for it, wherever it begins, at most one more than it needs, and
// found without a sum over the parts before it.
inline int64_t tiles_per_head(const AttentionInputs& in, int64_t rows, int tile) {
  return in.cu_seqlens ? rows / tile + in.S + 2 : ceil_div<int64_t>(rows, tile);
}

// kKeys: tiles of keys, else of queries, which come last tile first: it has the most keys, and what
// starts first should take longest.
template <bool kKeys, int kTile>
__device__ __forceinline__ Work look_for_work(const AttentionInputs& in) {
  static_assert(kTile % 4 == 0);
  const int heads = static_cast<int>(kKeys ? in.NKV : in.NH);
  const int tiles = static_cast<int>(gridDim.x) / (heads * static_cast<int>(in.B));
  const int block = static_cast<int>(blockIdx.x);
  int tile = kKeys ? block % tiles : tiles - 1 - block % tiles;
  Work w = {};
  w.head = block / tiles % heads;
  if (in.cu_seqlens) {
    // The last part that begins at or before this tile.
    int low = 0, high = static_cast<int>(in.S) + 1;
    const auto first_tile = [&](int n) { return part_begin(in, n) / kTile + n; };
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_tile(middle) <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    w.segment = packed_segment(in, low);
    tile -= first_tile(low);
  } else {
    w.segment = batch_segment(in, block / tiles / heads);
  }
  w.first = tile * kTile;
  w.rows = clamped((kKeys ? w.segment.keys : w.segment.queries) - w.first, 0, kTile);
  w.alive = clamped((kKeys ? w.segment.length : w.segment.alive) - w.first, 0, kTile);
  w.exists = tile >= 0 && w.rows > 0;
  return w;
}

// In shared memory: what a kernel asks for before and after its loop then takes no register in it.
template <bool kKeys, int kTile>
__device__ __forceinline__ const Work& find_work(const AttentionInputs& in) {
  Work& work = shared<Work>();
  if (threadIdx.x == 0) work = look_for_work<kKeys, kTile>(in);
  __syncthreads();  // orders the write before every thread's reads
  return work;
}

// Blocks for all tiles of all heads; 32-bit lane arithmetic needs the sizes below to fit.
inline unsigned grid_of(const char* name, const AttentionInputs& in, int64_t heads, int64_t rows,
                        int tile) {
  constexpr int64_t kMostRows = int64_t{1} << 30;
  const int64_t blocks = in.B * heads * tiles_per_head(in, rows, tile);
  if (in.Tq > kMostRows || in.Tk > kMostRows || blocks > INT_MAX) {
    throw_value_error(std::string(name) +
                      ": q and k must have at most 2^30 rows and need at most " +
                      "2^31 - 1 blocks on CUDA, got " + std::to_string(in.Tq) + " and " +
                      std::to_string(in.Tk) + " rows and " + std::to_string(blocks) + " blocks");
  }
  return static_cast<unsigned>(blocks);
}

// ---------------------------------------------------------------- the mask

// Row r meets the columns [lower(r), upper(r)). Rows are queries and columns keys, or the other way
// round; both bounds grow with r.
struct Band {
  int lower_shift, lower_least;
  int upper_shift, upper_most;

  __device__ __forceinline__ int lower(int r) const { return max(r + lower_shift, lower_least); }
  __device__ __forceinline__ int upper(int r) const { return min(r + upper_shift, upper_most); }
  // Whether some row of [first, last] meets some column of [begin, end).
  __device__ __forceinline__ bool meets(int first, int last, int begin, int end) const {
    return lower(first) < end && upper(last) > begin;
  }
};

// A window of all keys is no window.
__device__ __forceinline__ int window_of(const AttentionInputs& in) {
  return static_cast<int>(in.window > 0 && in.window < in.Tk ? in.window : in.Tk);
}

template <bool kRowsAreKeys>
__device__ __forceinline__ Band band_of(const Segment& s, int window) {
  if (kRowsAreKeys) return {-s.offset, 0, window - s.offset, s.alive};
  return {s.offset - window + 1, s.key_lo, s.offset + 1, s.length};
}

// The tiles of columns that the rows [first, last] meet, in the order they are walked: those where
// some row meets only some columns first, backwards from the diagonal and then at the window's
// edge; then those without a mask.
struct TileOrder {
  int begin, full_begin, full_end, end;

  __device__ __forceinline__ TileOrder(const Band& band, int first, int last, int tile) {
    const int low = band.lower(first), high = band.upper(last);
    begin = low / tile;
    end = high > low ? (high + tile - 1) / tile : begin;
    full_begin = (band.lower(last) + tile - 1) / tile;
    full_end = max(band.upper(first), 0) / tile;
    if (full_begin >= full_end) full_begin = full_end = begin;
  }
  __device__ __forceinline__ int count() const { return end - begin; }
  __device__ __forceinline__ int masked() const { return count() - (full_end - full_begin); }
  __device__ __forceinline__ int at(int step) const {
    const int high = end - full_end, low = full_begin - begin;  // masked tiles of either kind
    // Chosen, not branched to: every step asks.
    int first = end;
    if (step >= high) first = full_begin + high;
    if (step >= high + low) first = full_end + high + low;
    return first - 1 - step;
  }
};

// ---------------------------------------------------------------- scores

// scale q . k, capped and biased, times `unit` (1, or log2(e) where the softmax is taken in exp2).
// kFast: the tanh from one ex2, absolutely exact to 2^-22, which is what 16-bit operands allow.
template <class Acc, bool kFast>
struct Scores {
  __device__ __forceinline__ Scores(const AttentionInputs& in, int b, int head, Acc unit)
      : factor(static_cast<Acc>(in.scale) * unit), cap(static_cast<Acc>(in.softcap) * unit) {
    if (in.softcap > 0) into_cap = static_cast<Acc>(in.scale / in.softcap);
    take_head(in, b, head, unit);
  }

  // Of what the scores are made only the slope is a head's own.
  __device__ __forceinline__ void take_head(const AttentionInputs& in, int b, int head, Acc unit) {
    if (in.alibi_slopes)
      slope = unit * static_cast<Acc>(in.alibi_slopes[b * in.alibi_batch_stride + head]);
  }

  // And the derivative of the score by scale q . k.
  __device__ __forceinline__ Acc of(Acc product, int distance, Acc& derivative) const {
    Acc x = product * factor;
    derivative = 1;
    if (cap > 0) {
      const Acc y = product * into_cap;
      if constexpr (kFast) {
        const float e = ex2_approx(-2 * kLog2E * fabsf(y));
        const float s = __fdividef(1.0f, 1.0f + e);
        x = copysignf((1.0f - e) * s, y) * cap;
        derivative = 4 * e * s * s;
      } else {
        x = rounded_product(tanh_of(y), cap);
        derivative = tanh_derivative(y);
      }
    }
    return x - slope * static_cast<Acc>(distance);
  }
  __device__ __forceinline__ Acc of(Acc product, int distance) const {
    Acc derivative;
    return of(product, distance, derivative);
  }

  Acc factor;
  Acc cap;
  Acc into_cap = 0;
  Acc slope = 0;
};

// ---------------------------------------------------------------- dropout

struct Dropout {
  __device__ __forceinline__ Dropout(const AttentionInputs& in, const Segment& s, int head)
      : on(in.dropout_p > 0),
        seed(on ? static_cast<uint64_t>(*in.seed) : 0),
        threshold(dropout_threshold(in.dropout_p)),
        b(s.b),
        h(head),
        NH(static_cast<int>(in.NH)),
        q_row(s.q_row),
        k_block(s.k_row / 4) {}

  // Bit n says whether query i of the segment keeps its key 4 * block + n.
  __device__ __forceinline__ uint32_t keep(int i, int block) const {
    const PhiloxBits bits = attention_dropout_bits(seed, b, h, NH, q_row + i, k_block + block);
    uint32_t kept = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) kept |= static_cast<uint32_t>(bits.word[n] >= threshold) << n;
    return kept;
  }

  bool on;
  uint64_t seed;
  uint32_t threshold;
  int b, h, NH, q_row, k_block;
};

__device__ __forceinline__ double keep_scale(const AttentionInputs& in) {
  return 1.0 / (1.0 - in.dropout_p);
}

// ---------------------------------------------------------------- tensors

// Row t of head h is at base + offset(b, h, t).
__device__ __forceinline__ int64_t offset_of(const HeadStrides& s, int b, int h, int t) {
  return b * s.b + h * s.h + t * s.t;
}

// Where a query's number is in [B, NH, Tq].
__device__ __forceinline__ int64_t row_number(const AttentionInputs& in, int b, int h, int t) {
  return (static_cast<int64_t>(b) * in.NH + h) * in.Tq + t;
}

// What the backward needs of a query row: p_ij = exp(s_ij - lse), ds_ij = p_ij (dp_ij - delta). lse
// is +inf where the row has no key, which makes p 0 without asking.
//
// delta = sum_d dout out is summed in the very order in which dp = sum_d dout v is: where a row
// sees one key, out is v and the difference has to be 0, not a rounding error.
template <class Acc>
struct alignas(2 * sizeof(Acc)) RowStats {
  Acc lse;    // in the unit of the scores
  Acc delta;  // tensor cores: less dlse
};

// Natural logarithm of the sum of exp over a row, as the reference has it where a score was +inf.
template <class Acc>
__device__ __forceinline__ Acc log_sum(Acc max, Acc unit, Acc sum) {
  return max == infinity<Acc>() ? max : max * unit + log_of(sum);
}

// ---------------------------------------------------------------- the kernels' families

// Each takes any arguments of its element types; attention.cu chooses.
void attention_forward_mma(const AttentionForwardArgs& args, Stream stream);
void attention_backward_mma(const AttentionBackwardArgs& args, Stream stream);
void attention_forward_simt(const AttentionForwardArgs& args, Stream stream);
void attention_backward_simt(const AttentionBackwardArgs& args, Stream stream);

}  // namespace seqkern::cuda
