// Causal attention in products of bf16, forward: as attention.cpp, with strips of 32 queries
// against groups of 32 keys (docs/math/attention.md).
#include "cpu/attention_matrix_tiles.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

inline constexpr int64_t kBytes = 512 * 1024;

// How the heads are cut: into blocks of `queries` each. The caller counts tasks of fewer queries,
// for kernels that convert what they read to floats; packing keys and values for so few takes as
// long as their products. The tasks after the last block are empty.
struct ForwardPlan {
  static constexpr int64_t kWidest = 384 * 128;  // queries times D
  static constexpr int64_t kFewest = 16;         // blocks, for threads to share

  int64_t queries, blocks;  // of a head

  explicit ForwardPlan(const AttentionInputs& in) {
    const int64_t least_queries = attention_query_block(in), heads = in.B * in.NH;
    for (int64_t times = 4; times > 0; times /= 2) {
      queries = least_queries * times;
      blocks = ceil_div(in.Tq, queries);
      if (queries * in.D <= kWidest && heads * blocks >= kFewest) break;
    }
  }
};

struct MatrixForward {
  const AttentionForwardArgs& a;
  const AttentionInputs& in;
  int64_t b, h, i, n;  // queries [i, i + n)
  AttentionRow row;
  Transform<float> transform;
  Strips strips;
  // Scores are S times `scale`, unless the transform has applied it; `power`: the same to base 2.
  float scale, power;
  int64_t columns, filled;  // tiles of 16 numbers along D in pairs; those that hold some of it
  alignas(64) float max[Strips::kMost];  // of S so far, never -inf
  alignas(64) float sum[Strips::kMost];  // of exp(score - max)
  bool seen[Strips::kMost / kStrip];     // whether there was a block yet
  uint16_t *q, *k, *v;                   // tiles: queries as columns, keys as rows, keys as depth
  uint16_t* p;                           // P^T of a strip [keys / 32, 2]
  float *s, *out;  // S^T of a strip [keys, 32], out^T of all strips [16 columns, 32]

  MatrixForward(const AttentionForwardArgs& a, int64_t b, int64_t h, int64_t i, int64_t n)
      : a(a), in(a.in), b(b), h(h), i(i), n(n), row(a.in, b), transform(a.in, b, h) {
    scale = transform.plain ? transform.scale : 1.0f;
    power = scale * kLog2e;
    columns = tile_depths(in.D) * 2;
    filled = (in.D + 15) / 16;
    strips.set(row, i, n);
    for (int64_t c = 0; c < strips.count * kStrip; ++c) max[c] = lowest<float>(), sum[c] = 0;
    for (int64_t t = 0; t < strips.count; ++t) seen[t] = false;
  }

  void run() {
    alignas(64) char scratch[kBytes];
    const int64_t kv = h / (in.NH / in.NKV), depths = tile_depths(in.D);
    const int64_t keys_of_block = in.D <= 128 ? 256 : 128;
    Carve<uint16_t> numbers{reinterpret_cast<uint16_t*>(scratch)};
    q = numbers.take(strips.count * 2 * depths * kTileNumbers);
    k = numbers.take(keys_of_block / 16 * depths * kTileNumbers);
    v = numbers.take(keys_of_block / 32 * columns * kTileNumbers);
    p = numbers.take(keys_of_block / 32 * 2 * kTileNumbers);
    s = reinterpret_cast<float*>(numbers.take(keys_of_block * kStrip * 2));
    out = reinterpret_cast<float*>(numbers.take(strips.count * columns * L * kStrip * 2));
    pack_columns(q, rows(in.q, in.q_strides, h, i, n), strips.count * kStrip);

    const int64_t first = row.first_key(i), end = row.end_key(i + n - 1);
    for (int64_t j = first; j < end; j += keys_of_block) {
      const int64_t keys = least(keys_of_block, end - j);
      const int64_t padded = (keys + kStrip - 1) / kStrip * kStrip;
      pack_rows(k, rows(in.k, in.k_strides, kv, j, keys), padded);
      pack_depths<true>(v, rows(in.v, in.v_strides, kv, j, keys), padded);
      for (int64_t t = 0; t < strips.count; ++t) {
        const Strips::Groups groups = strips.groups(t, j, keys);
        if (groups.begin < groups.end) attend(t, groups, j, end);
      }
    }
    for (int64_t t = 0; t < strips.count; ++t) write(t);
  }

  Rows rows(const void* base, const HeadStrides& strides, int64_t head, int64_t t,
            int64_t count) const {
    return {at(static_cast<const BFloat16*>(base), strides, b, head, t), strides.t, count, in.D};
  }

  void attend(int64_t t, const Strips::Groups& groups, int64_t j, int64_t end) {
    const int64_t depths = tile_depths(in.D), count = groups.end - groups.begin;
    float* scores = s + groups.begin * kStrip * kStrip;
    multiply_strip({k + groups.begin * columns * kTileNumbers, depths, 1}, 2 * count,
                   {q + t * columns * kTileNumbers, depths, 1}, depths, scores);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      if (transform.plain && strips.whole(t, j + g * kStrip, end)) continue;
      strips.finish(s + g * kStrip * kStrip, t, j + g * kStrip, end, transform, nullptr);
    }
    float* o = out + t * columns * L * kStrip;
    raise_maximum(t, scores, count * kStrip, o);
    if (in.seed) {
      weights<true>(t, groups, j);
    } else {
      weights<false>(t, groups, j);
    }
    multiply_block({v + groups.begin * columns * kTileNumbers, 1, columns}, filled,
                   {p + groups.begin * 2 * kTileNumbers, 1, 2}, 2, count, o, kStrip, seen[t]);
    seen[t] = true;
  }

  // The maxima of a strip; what was summed so far becomes relative to them.
  __attribute__((noinline)) void raise_maximum(int64_t t, const float* scores, int64_t keys,
                                               float* o) {
    VecF m[2][2];
    for (int c = 0; c < 2; ++c) m[c][0] = m[c][1] = load(max + t * kStrip + c * L);
    for (int64_t r = 0; r < keys; r += 2) {
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) {
        VecF& largest = m[e % 2][e / 2];
        largest = vmax(largest, load(scores + r * kStrip + e * L));
      }
    }
    VecF shrink[2];
    VecI32 any = {};
    for (int c = 0; c < 2; ++c) {
      const VecF before = load(max + t * kStrip + c * L), now = vmax(m[c][0], m[c][1]);
      store(max + t * kStrip + c * L, now);
      shrink[c] = Power::of(before - now, power);
      any |= before < now;
      store(sum + t * kStrip + c * L, load(sum + t * kStrip + c * L) * shrink[c]);
    }
    if (!seen[t] || !hmax(bitcast<VecI32>(-any))) return;
    for (int64_t d = 0; d < filled * L; ++d) {
      for (int c = 0; c < 2; ++c) {
        float* to = o + d * kStrip + c * L;
        store(to, load(to) * shrink[c]);
      }
    }
  }

  // P^T of a strip: 2 rows of scores become a row of pairs. Differences from the maximum are
  // scaled, not the two: a query that sees one key gets exactly its value.
  template <bool kDropout>
  __attribute__((noinline)) void weights(int64_t t, const Strips::Groups& groups, int64_t j) {
    constexpr int64_t kRows = 8;
    alignas(64) float factors[kRows * kStrip];
    VecF shift[2], total[2] = {};
    for (int c = 0; c < 2; ++c) shift[c] = load(max + t * kStrip + c * L);
    for (int64_t r = groups.begin * kStrip; r < groups.end * kStrip; r += kRows) {
      if constexpr (kDropout) {
        dropout_factors(factors, kStrip, in, b, h, i + t * kStrip, kStrip, j + r, kRows);
      }
      const float* x = s + r * kStrip;
      uint16_t* to = p + r / kStrip * 2 * kTileNumbers + r % kStrip * L;
#pragma GCC unroll 4
      for (int64_t e = 0; e < kRows; e += 2) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          VecF p0 = Power::of(load(x + e * kStrip + c * L) - shift[c], power);
          VecF p1 = Power::of(load(x + (e + 1) * kStrip + c * L) - shift[c], power);
          total[c] += p0 + p1;
          if constexpr (kDropout) {
            p0 *= load(factors + e * kStrip + c * L);
            p1 *= load(factors + (e + 1) * kStrip + c * L);
          }
          store_words(to + c * kTileNumbers + e * L, zip_halves(round_two(p0, p1), kWords));
        }
      }
    }
    for (int c = 0; c < 2; ++c) {
      store(sum + t * kStrip + c * L, load(sum + t * kStrip + c * L) + total[c]);
    }
  }

  void write(int64_t t) {
    const float* o = out + t * columns * L * kStrip;
    float* lse = static_cast<float*>(a.lse) + (b * in.NH + h) * in.Tq + i;
    for (int64_t c = 0; c < kStrip && t * kStrip + c < n; c += L) {
      const int64_t r = t * kStrip + c, count = least<int64_t>(L, n - r);
      const VecF inverse = 1.0f / load(sum + r);
      BFloat16* to = at(static_cast<BFloat16*>(a.out), a.out_strides, b, h, i + r);
      for (int64_t d = 0; d < in.D; d += L) {
        VecF square[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) square[l] = load(o + (d + l) * kStrip + c) * inverse;
        transpose(square);
        for (int64_t l = 0; l < count; ++l) {
          store_part<float>(to + l * a.out_strides.t + d, square[l], in.D - d);
        }
      }
      for (int64_t l = 0; l < count; ++l) lse[r + l] = log_sum(r + l);
    }
  }

  float log_sum(int64_t r) const {
    if (max[r] == kInfinity<float>) return max[r];
    return max[r] * scale + log1(sum[r]);
  }
};

}  // namespace

void attention_forward(const AttentionForwardArgs& a, int64_t begin, int64_t end) {
  if (!in_tiles(a.in)) return avx512::attention_forward(a, begin, end);
  const WholeTiles tiles;
  const ForwardPlan plan(a.in);
  for (int64_t task = begin; task < end; ++task) {
    // Head after head: reading its keys and values takes longer than their products where they have
    // left second-level cache.
    const int64_t head = task / plan.blocks, from_last = task % plan.blocks;
    if (head >= a.in.B * a.in.NH) return;
    const AttentionForwardBlock block(a.in, plan.queries, head, plan.blocks - 1 - from_last);
    zero_queries<BFloat16>(a, block.b, block.h, block.begin, block.first);
    zero_queries<BFloat16>(a, block.b, block.h, block.last, block.end);
    if (block.first < block.last) {
      MatrixForward(a, block.b, block.h, block.first, block.last - block.first).run();
    }
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
