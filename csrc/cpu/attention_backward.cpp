// Causal attention on the CPU, backward: scores are computed anew, block by block, from q, k and
// the log-sum-exp; five products per pair of blocks (docs/math/attention.md).
#include "cpu/attention.h"
#include "cpu/attention_block_pair.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Queries and keys of a block: the largest that leave the scratch room for everything.
struct BlockSizes {
  int64_t queries, keys;
};
template <class Acc>
BlockSizes block_sizes(int64_t D, int tiles) {
  constexpr BlockSizes kTry[] = {{96, 96}, {96, 48}, {48, 48}, {48, 32}, {32, 32}, {16, 32}};
  const int64_t stride = row_stride<Acc>(D);
  for (const BlockSizes& size : kTry) {
    const int64_t columns = round_up<Acc>(size.queries);
    const int64_t items = 2 * D * columns + 3 * columns * stride + 2 * size.keys * stride +
                          tiles * size.keys * columns + 256;
    if (items * static_cast<int64_t>(sizeof(Acc)) <= kScratchBytes) return size;
  }
  return {16, 16};
}

template <class T>
struct BackwardTask : AttentionBlockPair<AccOf<T>> {
  using Acc = AccOf<T>;
  using Pair = AttentionBlockPair<Acc>;
  using Pair::bands, Pair::cap, Pair::delta, Pair::dlse, Pair::dout_columns, Pair::dropped,
      Pair::ds, Pair::in, Pair::k_rows, Pair::lse, Pair::p, Pair::q_columns, Pair::stride,
      Pair::v_rows;
  static constexpr int L = kLanes<Acc>;

  const AttentionBackwardArgs& a;
  const AttentionBackwardPlan& plan;
  int64_t b, kv, chunk, first_key, end_key;
  AttentionRow row;
  BlockSizes size;
  // A block of queries as rows [columns, stride]; q times scale.
  Acc *q_rows, *dout_rows, *dq;

  BackwardTask(const AttentionBackwardArgs& a, const AttentionBackwardPlan& plan, int64_t b,
               int64_t kv, int64_t chunk)
      : Pair(a.in),
        a(a),
        plan(plan),
        b(b),
        kv(kv),
        chunk(chunk),
        first_key(chunk * plan.chunk),
        end_key(least(first_key + plan.chunk, a.in.Tk)),
        row(a.in, b) {}

  // ---------------------------------------------------------------- where sums go

  struct Sums {
    Acc* at;  // of the chunk's first key
    int64_t stride;
  };
  Sums sums(int64_t workspace_at, void* gradient, const HeadStrides& s) const {
    if (!plan.dkv_sums) return {at(static_cast<Acc*>(gradient), s, b, kv, first_key), s.t};
    Acc* base = reinterpret_cast<Acc*>(static_cast<char*>(a.workspace) + workspace_at);
    return {base + ((b * in.NKV + kv) * in.Tk + first_key) * plan.width, plan.width};
  }

  void clear(const Sums& to) const {
    const int64_t D = plan.dkv_sums ? plan.width : in.D;
    for (int64_t j = first_key; j < end_key; ++j) {
      for (int64_t d = 0; d < D; d += L) store(to.at + (j - first_key) * to.stride + d, Vec<Acc>{});
    }
  }

  void convert(const Sums& from, void* gradient, const HeadStrides& s) const {
    if (!plan.dkv_sums) return;
    for (int64_t j = first_key; j < end_key; ++j) {
      write_row(at(static_cast<T*>(gradient), s, b, kv, j), from.at + (j - first_key) * from.stride,
                Acc(1));
    }
  }

  void write_row(T* to, const Acc* from, Acc factor) const {
    for (int64_t d = 0; d < in.D; d += L) {
      store_part<Acc>(to + d, load(from + d) * factor, in.D - d);
    }
  }

  // ---------------------------------------------------------------- the loop over blocks

  void run() {
    alignas(64) Acc scratch[kScratchBytes / sizeof(Acc)];
    const int64_t D = in.D, group = in.NH / in.NKV;
    const bool options = in.softcap > 0 || in.seed;
    size = block_sizes<Acc>(D, options ? 4 : 2);
    stride = row_stride<Acc>(D);
    const int64_t columns = round_up<Acc>(size.queries);
    Carve<Acc> carve{scratch};
    q_columns = carve.take(D * columns);
    dout_columns = carve.take(D * columns);
    q_rows = carve.take(columns * stride);
    dout_rows = carve.take(columns * stride);
    dq = carve.take(columns * stride);
    k_rows = carve.take(size.keys * stride);
    v_rows = carve.take(size.keys * stride);
    p = carve.take(size.keys * columns);
    ds = carve.take(size.keys * columns);
    cap = options ? carve.take(size.keys * columns) : nullptr;
    dropped = options ? carve.take(size.keys * columns) : nullptr;

    const Sums dk = sums(plan.dk_at, a.dk, a.dk_strides);
    const Sums dv = sums(plan.dv_at, a.dv, a.dv_strides);
    clear(dk);
    clear(dv);
    // The keys that are not padding, and the queries that see one of them.
    const int64_t first = most(first_key, in.cu_seqlens ? row.begin : 0);
    const int64_t end = least(end_key, row.end + row.offset);
    const int64_t i_first = first < end ? row.first_query(first) : row.end;
    const int64_t i_end = first < end ? row.end_query(end - 1) : row.end;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      if (!plan.dq_sums) {
        zero_dq(h, 0, row.begin);
        zero_dq(h, most(row.end, row.begin), in.Tq);
      }
      // Blocks at multiples of their size, wherever the padding ends.
      for (int64_t i = i_first / size.queries * size.queries; i < i_end; i += size.queries) {
        const int64_t from = most(i, row.begin);
        queries(h, from, least(i + size.queries, row.end) - from, first, end, dk, dv);
      }
    }
    convert(dk, a.dk, a.dk_strides);
    convert(dv, a.dv, a.dv_strides);
  }

  void zero_dq(int64_t h, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      T* to = at(static_cast<T*>(a.dq), a.dq_strides, b, h, i);
      for (int64_t d = 0; d < in.D; ++d) store1(to + d, Acc(0));
    }
  }

  // Queries [i, i + n) of head h against the chunk's keys in [first, end).
  void queries(int64_t h, int64_t i, int64_t n, int64_t first, int64_t end, const Sums& dk,
               const Sums& dv) {
    const Transform<Acc> transform(in, b, h);
    bands.set_queries(row, i, n);
    load_queries(h, i, n);
    const int64_t columns = bands.columns;
    // Blocks of keys at multiples of their size from the chunk's first key.
    const int64_t low = most(first, row.first_key(i));
    const int64_t high = least(end, row.end_key(i + n - 1));
    bool fresh = true;
    for (int64_t block = first_key + (low - first_key) / size.keys * size.keys; block < high;
         block += size.keys) {
      const int64_t j = most(block, first);
      const int64_t count = least(block + size.keys, high) - j;
      bands.set_keys(row, i, j, count);
      copy_rows<Acc>(k_rows, stride, at(static_cast<const T*>(in.k), in.k_strides, b, kv, j),
                     in.k_strides.t, count, in.D, Acc(1));
      copy_rows<Acc>(v_rows, stride, at(static_cast<const T*>(in.v), in.v_strides, b, kv, j),
                     in.v_strides.t, count, in.D, Acc(1));
      this->weights(transform, j, count);
      if (a.dout) {
        if (in.seed) {
          dropout_factors(dropped, columns, in, b, h, i, columns, j, count);
        }
        this->score_gradients(count);
        const int64_t at_j = j - first_key;
        band_multiply<Acc>(dv.at + at_j * dv.stride, dv.stride, nullptr, false, p, columns, 1,
                           dout_rows, stride, in.D, count, n, bands.query_begin, bands.query_end);
      } else {
        this->score_gradients_of_lse(count);
      }
      band_multiply<Acc>(dk.at + (j - first_key) * dk.stride, dk.stride, nullptr, false, ds,
                         columns, 1, q_rows, stride, in.D, count, n, bands.query_begin,
                         bands.query_end);
      band_multiply<Acc>(dq, stride, nullptr, fresh, ds, 1, columns, k_rows, stride, in.D, n, count,
                         bands.key_begin, bands.key_end);
      fresh = false;
    }
    if (fresh) {
      for (int64_t e = 0; e < n * stride; e += L) store(dq + e, Vec<Acc>{});
    }
    write_dq(h, i, n);
  }

  void load_queries(int64_t h, int64_t i, int64_t n) {
    const int64_t columns = bands.columns, D = in.D;
    const T* q = at(static_cast<const T*>(in.q), in.q_strides, b, h, i);
    const T* dout = a.dout ? at(static_cast<const T*>(a.dout), a.dout_strides, b, h, i) : nullptr;
    const int64_t at_row = (b * in.NH + h) * in.Tq + i;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t r = least(c, n - 1);
      lse[c] = static_cast<const Acc*>(a.lse)[at_row + r];
      dlse[c] = a.dlse ? static_cast<const Acc*>(a.dlse)[at_row + r] : Acc(0);
      delta[c] = 0;
    }
    if (dout) {
      transpose_rows<Acc>(dout_columns, columns, dout, a.dout_strides.t, n, columns, D);
      copy_rows<Acc>(dout_rows, stride, dout, a.dout_strides.t, n, D, Acc(1));
      // In the order in which the tiles sum dout . v: a query that sees one key has out = v, and
      // its gradient is then exactly zero.
      const T* out = at(static_cast<const T*>(a.out), a.out_strides, b, h, i);
      transpose_rows<Acc>(q_columns, columns, out, a.out_strides.t, n, columns, D);
      const int64_t parts = (D + kChain - 1) / kChain, part = (D + parts - 1) / parts;
      for (int64_t c = 0; c < columns; c += L) {
        Vec<Acc> sum = {};
        for (int64_t from = 0; from < D; from += part) {
          Vec<Acc> more = {};
          for (int64_t d = from; d < least(from + part, D); ++d) {
            more += load(q_columns + d * columns + c) * load(dout_columns + d * columns + c);
          }
          sum = from == 0 ? more : sum + more;
        }
        store(delta + c, sum);
      }
    }
    transpose_rows<Acc>(q_columns, columns, q, in.q_strides.t, n, columns, D);
    copy_rows<Acc>(q_rows, stride, q, in.q_strides.t, n, D, static_cast<Acc>(in.scale));
  }

  // ---------------------------------------------------------------- the gradient of q

  void write_dq(int64_t h, int64_t i, int64_t n) const {
    const Acc scale = static_cast<Acc>(in.scale);
    if (!plan.dq_sums) {
      for (int64_t r = 0; r < n; ++r) {
        write_row(at(static_cast<T*>(a.dq), a.dq_strides, b, h, i + r), dq + r * stride, scale);
      }
      return;
    }
    Acc* to = static_cast<Acc*>(a.workspace) +
              (((chunk * in.B + b) * in.NH + h) * in.Tq + i) * plan.width;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t d = 0; d < in.D; d += L) {
        store(to + r * plan.width + d, load(dq + r * stride + d) * scale);
      }
    }
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& a, int64_t begin, int64_t end) {
  const AttentionBackwardPlan plan(a.in);
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    // The first keys are seen by the most queries: their chunks come first.
    const int64_t heads = a.in.B * a.in.NKV;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads;
      BackwardTask<typename decltype(tag)::type>(a, plan, head / a.in.NKV, head % a.in.NKV,
                                                 task / heads)
          .run();
    }
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
