// Causal attention in products of bf16, backward: as attention_backward.cpp, with strips of 32
// queries against groups of 32 keys (docs/math/attention.md).
#include "cpu/attention_matrix_tiles.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

inline constexpr int64_t kBytes = 800 * 1024;
inline constexpr int64_t kKept = 512 * 128;  // keys times D that are packed once for all queries

struct MatrixBackward {
  const AttentionBackwardArgs& a;
  const AttentionInputs& in;
  const AttentionBackwardPlan& plan;
  int64_t b, kv, chunk, first_key;
  AttentionRow row;
  int64_t first, end;       // the chunk's keys that are not padding
  int64_t block;            // queries and keys of a block
  int64_t depths, columns;  // tiles along D: 32 numbers each, 16 each in pairs
  int64_t filled;           // those of 16 that hold some of D
  bool kept;                // whether all keys of the chunk are packed at once
  float power;              // what makes scores those to base 2
  Strips strips;
  alignas(64) float lse[Strips::kMost];  // to base 2
  alignas(64) float delta[Strips::kMost];
  alignas(64) float dlse[Strips::kMost];
  // Keys: rows of k and v, and k with keys as depth. Queries: as columns, and with them as depth.
  uint16_t *k_rows, *v_rows, *k_depths;
  uint16_t *q_columns, *dout_columns, *q_depths, *dout_depths;
  // Of a pair of blocks [keys / 16, strips]: P^T and dS^T. Of a strip: dS^T with keys as depth.
  uint16_t *p, *ds, *ds_depths;
  float *s, *dp, *cap;  // of a strip [keys, 32]
  float* dq;            // dq^T [16 columns, queries]

  MatrixBackward(const AttentionBackwardArgs& a, const AttentionBackwardPlan& plan, int64_t b,
                 int64_t kv, int64_t chunk)
      : a(a),
        in(a.in),
        plan(plan),
        b(b),
        kv(kv),
        chunk(chunk),
        first_key(chunk * plan.chunk),
        row(a.in, b),
        first(most(first_key, a.in.cu_seqlens ? row.begin : 0)),
        end(least(least(first_key + plan.chunk, a.in.Tk), row.end + row.offset)),
        block(a.in.D <= 128 ? 128 : 64),
        depths(tile_depths(a.in.D)),
        columns(2 * depths),
        filled((a.in.D + 15) / 16) {}

  // ---------------------------------------------------------------- where sums go

  float* sums(int64_t workspace_at) const {  // of the chunk's first key
    float* base = reinterpret_cast<float*>(static_cast<char*>(a.workspace) + workspace_at);
    return base + ((b * in.NKV + kv) * in.Tk + first_key) * plan.width;
  }
  int64_t sum_rows() const { return least(plan.chunk, in.Tk - first_key); }

  void clear(float* sum) const {
    __builtin_memset(sum, 0, sum_rows() * plan.width * sizeof(float));
  }

  void convert(const float* from, void* gradient, const HeadStrides& strides, float factor) const {
    for (int64_t r = 0; r < sum_rows(); ++r, from += plan.width) {
      BFloat16* to = at(static_cast<BFloat16*>(gradient), strides, b, kv, first_key + r);
      for (int64_t d = 0; d < in.D; d += L) {
        store_part<float>(to + d, load(from + d) * factor, in.D - d);
      }
    }
  }

  // ---------------------------------------------------------------- the loop over blocks

  void run() {
    alignas(64) char scratch[kBytes];
    Carve<uint16_t> numbers{reinterpret_cast<uint16_t*>(scratch)};
    const auto tiles = [&](int64_t n) { return numbers.take(n * kTileNumbers); };
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(numbers.take(2 * n)); };
    const int64_t all = first < end ? (end - first + kStrip - 1) / kStrip * kStrip : 0;
    kept = all * depths * kTileDepth <= kKept;
    const int64_t keys = kept ? all : block, groups = block / kStrip;
    k_rows = tiles(keys / 16 * depths);
    v_rows = tiles(keys / 16 * depths);
    k_depths = tiles(keys / 16 * depths);
    q_columns = tiles(block / 16 * depths);
    dout_columns = tiles(block / 16 * depths);
    q_depths = tiles(block / 16 * depths);
    dout_depths = tiles(block / 16 * depths);
    p = tiles(2 * groups * groups);
    ds = tiles(2 * groups * groups);
    ds_depths = tiles(2 * groups);
    s = floats(block * kStrip);
    dp = floats(block * kStrip);
    cap = in.softcap > 0 ? floats(block * kStrip) : nullptr;
    dq = floats(columns * L * block);

    float *dk = sums(plan.dk_at), *dv = sums(plan.dv_at);
    clear(dk);
    clear(dv);
    if (kept && first < end) pack_keys(first, end - first);
    const int64_t i_first = first < end ? row.first_query(first) : row.end;
    const int64_t i_end = first < end ? row.end_query(end - 1) : row.end;
    const int64_t group = in.NH / in.NKV;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      if (!plan.dq_sums) {
        zero_dq(h, 0, row.begin);
        zero_dq(h, most(row.end, row.begin), in.Tq);
      }
      // Blocks at multiples of their size, wherever the padding ends.
      for (int64_t i = i_first / block * block; i < i_end; i += block) {
        const int64_t from = most(i, row.begin);
        queries(h, from, least(i + block, row.end) - from, dk, dv);
      }
    }
    convert(dk, a.dk, a.dk_strides, static_cast<float>(in.scale));
    convert(dv, a.dv, a.dv_strides, 1.0f);
  }

  void zero_dq(int64_t h, int64_t begin, int64_t end_query) const {
    for (int64_t i = begin; i < end_query; ++i) {
      __builtin_memset(at(static_cast<BFloat16*>(a.dq), a.dq_strides, b, h, i), 0,
                       in.D * sizeof(BFloat16));
    }
  }

  Rows rows(const void* base, const HeadStrides& strides, int64_t head, int64_t t,
            int64_t count) const {
    return {at(static_cast<const BFloat16*>(base), strides, b, head, t), strides.t, count, in.D};
  }

  void pack_keys(int64_t j, int64_t count) const {
    const int64_t padded = (count + kStrip - 1) / kStrip * kStrip;
    const Rows k = rows(in.k, in.k_strides, kv, j, count);
    const Rows v = rows(in.v, in.v_strides, kv, j, count);
    pack_rows(k_rows, k, padded);
    pack_rows(v_rows, v, padded);
    pack_depths<true>(k_depths, k, padded);
  }

  // Queries [i, i + n) of head h against the chunk's keys.
  void queries(int64_t h, int64_t i, int64_t n, float* dk, float* dv) {
    const Transform<float> transform(in, b, h);
    power = (transform.plain ? transform.scale : 1.0f) * kLog2e;
    strips.set(row, i, n);
    load_queries(h, i, n);
    const int64_t low = most(first, row.first_key(i));
    const int64_t high = least(end, row.end_key(i + n - 1));
    for (int64_t j = first + (low - first) / block * block; j < high; j += block) {
      const int64_t count = least(block, high - j);
      if (!kept) pack_keys(j, count);
      pair(transform, h, i, j, count, kept ? (j - first) / kStrip : 0);
      add_up(j, count, p, dout_depths, dv);
      add_up(j, count, ds, q_depths, dk);
    }
    write_dq(h, i, n);
  }

  void load_queries(int64_t h, int64_t i, int64_t n) {
    const int64_t padded = strips.count * kStrip, at_row = (b * in.NH + h) * in.Tq + i;
    const Rows q = rows(in.q, in.q_strides, h, i, n);
    const Rows dout = rows(a.dout, a.dout_strides, h, i, n);
    const Rows out = rows(a.out, a.out_strides, h, i, n);
    pack_columns(q_columns, q, padded);
    pack_columns(dout_columns, dout, padded);
    pack_depths<false>(q_depths, q, padded);
    pack_depths<false>(dout_depths, dout, padded);
    // In the order in which products sum dout . v: a query that sees one key has out = v, and
    // its gradient is then exactly zero.
    auto* out_rows = reinterpret_cast<uint16_t*>(dq);  // which has nothing yet
    pack_rows(out_rows, out, padded);
    alignas(64) float square[16 * 16];
    for (int64_t c = 0; c < padded; c += 16) {
      multiply_square<1, 1>({out_rows, depths, 1}, c / 16, {dout_columns, depths, 1}, c / 16,
                            depths, square, 16, false);
      for (int64_t l = 0; l < 16; ++l) delta[c + l] = square[17 * l];
    }
    for (int64_t c = 0; c < padded; ++c) {
      // Queries that fill the last strip have no weights.
      lse[c] = c < n ? static_cast<const float*>(a.lse)[at_row + c] * kLog2e : kInfinity<float>;
      dlse[c] = c < n && a.dlse ? static_cast<const float*>(a.dlse)[at_row + c] : 0.0f;
    }
    __builtin_memset(dq, 0, columns * L * padded * sizeof(float));
  }

  // ---------------------------------------------------------------- pairs of blocks

  // P^T, dS^T and dq of keys [j, j + count), which are packed from group `at_group` on.
  void pair(const Transform<float>& transform, int64_t h, int64_t i, int64_t j, int64_t count,
            int64_t at_group) {
    for (int64_t t = 0; t < strips.count; ++t) {
      const Strips::Groups groups = strips.groups(t, j, count);
      const int64_t some = groups.end - groups.begin, from = at_group + groups.begin;
      if (some <= 0) continue;
      const int64_t skip = groups.begin * kStrip * kStrip;
      multiply_strip({k_rows + from * columns * kTileNumbers, depths, 1}, 2 * some,
                     {q_columns + t * columns * kTileNumbers, depths, 1}, depths, s + skip);
      multiply_strip({v_rows + from * columns * kTileNumbers, depths, 1}, 2 * some,
                     {dout_columns + t * columns * kTileNumbers, depths, 1}, depths, dp + skip);
      for (int64_t g = groups.begin; g < groups.end; ++g) {
        if (transform.plain && strips.whole(t, j + g * kStrip, j + count)) continue;
        const int64_t to = g * kStrip * kStrip;
        strips.finish(s + to, t, j + g * kStrip, j + count, transform, cap ? cap + to : nullptr);
      }
      if (in.seed || cap) {
        gradients<true>(t, groups, h, i, j);
      } else {
        gradients<false>(t, groups, h, i, j);
      }
      multiply_block({k_depths + from * columns * kTileNumbers, 1, columns}, filled,
                     {ds_depths + groups.begin * 2 * kTileNumbers, 1, 2}, 2, some, dq + t * kStrip,
                     strips.count * kStrip, true);
    }
  }

  // P^T = 2^(S^T - lse), dS^T = P^T (dP^T - delta + dlse) of a strip.
  template <bool kOptions>
  __attribute__((noinline)) void gradients(int64_t t, const Strips::Groups& groups, int64_t h,
                                           int64_t i, int64_t j) {
    constexpr int64_t kRows = 8;
    alignas(64) float factors[kRows * kStrip];
    const int64_t across = block / kStrip;
    for (int64_t r = groups.begin * kStrip; r < groups.end * kStrip; r += kRows) {
      if (kOptions && in.seed) {
        dropout_factors(factors, kStrip, in, b, h, i + t * kStrip, kStrip, j + r, kRows);
      }
      const int64_t row_of_tile = (r / 16 * across + t) * kTileNumbers + r % 16 * 32;
      uint16_t* depth = ds_depths + r / kStrip * 2 * kTileNumbers + r % kStrip * L;
#pragma GCC unroll 4
      for (int64_t e = 0; e < kRows; e += 2) {
        VecF weight[2][2], gradient[2][2];
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          const int64_t c = u % 2 * L, from = (r + e + u / 2) * kStrip + c;
          VecF w = Power::of(load(s + from), power, load(lse + t * kStrip + c));
          VecF g = load(dp + from);
          weight[u / 2][u % 2] = w;
          if constexpr (kOptions) {
            if (in.seed) {
              const VecF keep = load(factors + (e + u / 2) * kStrip + c);
              g *= keep;
              weight[u / 2][u % 2] = w * keep;
            }
            if (cap) w *= select(w == 0.0f, VecF{}, load(cap + from));
          }
          gradient[u / 2][u % 2] =
              w * ((g - load(delta + t * kStrip + c)) + load(dlse + t * kStrip + c));
        }
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
          const int64_t to = row_of_tile + (e + u) * 32;
          store_words(p + to, round_two(weight[u][0], weight[u][1]));
          store_words(ds + to, round_two(gradient[u][0], gradient[u][1]));
          store_words(depth + u * kTileNumbers + e * L,
                      zip_halves(round_two(gradient[0][u], gradient[1][u]), kWords));
        }
      }
    }
  }

  // sum [keys, D] += weights [keys, queries] times rows of queries.
  void add_up(int64_t j, int64_t count, const uint16_t* weights, const uint16_t* queries,
              float* sum) {
    const int64_t across = block / kStrip, width = plan.width;
    for (int64_t g = 0; g * kStrip < count; ++g) {
      // The strips that see some of the group; they are neighbours.
      int64_t begin = 0, last = strips.count;
      while (begin < last && strips.groups(begin, j, count).end <= g) ++begin;
      while (last > begin && strips.groups(last - 1, j, count).begin > g) --last;
      if (begin == last) continue;
      const Operand left{weights + (2 * g * across + begin) * kTileNumbers, across, 1};
      const Operand right{queries + begin * columns * kTileNumbers, 1, columns};
      float* to = sum + (j - first_key + g * kStrip) * width;
      const int64_t height = least(kStrip, count - g * kStrip);
      if (height == kStrip) {
        multiply_block(left, 2, right, filled, last - begin, to, width, true);
        continue;
      }
      // What lies behind is another task's, or another sequence's.
      alignas(64) float some[kStrip * 256];
      multiply_block(left, 2, right, filled, last - begin, some, width, false);
      for (int64_t e = 0; e < height * width; e += L) store(to + e, load(to + e) + load(some + e));
    }
  }

  void write_dq(int64_t h, int64_t i, int64_t n) const {
    const float scale = static_cast<float>(in.scale);
    const int64_t stride = strips.count * kStrip;
    float* sum = static_cast<float*>(a.workspace) +
                 (((chunk * in.B + b) * in.NH + h) * in.Tq + i) * plan.width;
    for (int64_t c = 0; c < n; c += L) {
      for (int64_t d = 0; d < in.D; d += L) {
        VecF square[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) square[l] = load(dq + (d + l) * stride + c) * scale;
        transpose(square);
        for (int64_t l = 0; l < L && c + l < n; ++l) {
          if (plan.dq_sums) {
            store(sum + (c + l) * plan.width + d, square[l]);
            continue;
          }
          BFloat16* to = at(static_cast<BFloat16*>(a.dq), a.dq_strides, b, h, i + c + l) + d;
          store_part<float>(to, square[l], in.D - d);
        }
      }
    }
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& a, int64_t begin, int64_t end) {
  // Without a gradient of the output there is half a product left.
  if (!in_tiles(a.in) || !a.dout) return avx512::attention_backward(a, begin, end);
  const WholeTiles tiles;
  const AttentionBackwardPlan plan(a.in);
  for (int64_t task = begin; task < end; ++task) {
    // Head after head, whose queries then stay in second-level cache; of a head the chunk that the
    // most queries see first.
    const int64_t head = task / plan.chunks;
    MatrixBackward(a, plan, head / a.in.NKV, head % a.in.NKV, task % plan.chunks).run();
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
