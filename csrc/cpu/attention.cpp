// Causal attention on the CPU, forward: a block of queries against one block of keys after the
// other, with a running maximum and sum (docs/math/attention.md).
#include "cpu/attention.h"

#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Keys of a block: as many as leave room for the rest of a task's scratch.
template <class Acc>
int64_t key_block(int64_t D, int64_t columns) {
  const int64_t fixed = D * columns + columns * row_stride<Acc>(D) + 256;
  const int64_t per_key = columns + 2 * row_stride<Acc>(D);  // S^T, k, v
  const int64_t fits = (kScratchBytes / static_cast<int64_t>(sizeof(Acc)) - fixed) / per_key;
  return most<int64_t>(least<int64_t>(fits, 96) / 8 * 8, 8);
}

// The softmax of a block of queries over the blocks of keys so far, in the precision of sums.
template <class Acc>
struct RunningSoftmax {
  static constexpr int L = kLanes<Acc>;

  const AttentionInputs& in;
  Transform<Acc> transform;
  Bands<Acc> bands;
  alignas(64) Acc max[kMostColumns];   // of the scores so far
  alignas(64) Acc safe[kMostColumns];  // the same, finite where no score was above -inf yet
  alignas(64) Acc sum[kMostColumns];   // of exp(score - max)
  alignas(64) Acc part[kMostColumns];  // of one block: its maximum, then its sum
  alignas(64) Acc shrink[kMostColumns];

  RunningSoftmax(const AttentionInputs& in, int64_t b, int64_t h) : in(in), transform(in, b, h) {}

  // S^T of a block with its maxima; what is not visible is -inf.
  void scores(const Acc* k, int64_t k_stride, const Acc* q, Acc* s, int64_t j, int64_t count) {
    const int64_t columns = bands.columns;
    for (int64_t c = 0; c < columns; ++c) part[c] = -kInfinity<Acc>;
    band_tiles<Acc>(k, k_stride, q, columns, in.D, count, columns, bands.query_begin,
                    bands.query_end,
                    [&]<int R, int NV>(const Tile<Acc, R, NV>& tile, int64_t key, int64_t c)
                        __attribute__((always_inline)) {
                          Vec<Acc> m[NV];
                          Tile<Acc, R, NV> x = tile;
                          if (!transform.plain || !bands.full(j + key, R, c, NV * L)) {
                            mask(x, j + key, c);
                          }
#pragma GCC unroll 4
                          for (int v = 0; v < NV; ++v) m[v] = load(part + c + v * L);
#pragma GCC unroll 8
                          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
                            for (int v = 0; v < NV; ++v) {
                              m[v] = vmax(m[v], x.c[r][v]);
                              store(s + (key + r) * columns + c + v * L, x.c[r][v]);
                            }
                          }
#pragma GCC unroll 4
                          for (int v = 0; v < NV; ++v) store(part + c + v * L, m[v]);
                        });
    beside_band<Acc>(count, columns, bands.query_begin, bands.query_end,
                     [&](int64_t key, int64_t from, int64_t to) {
                       for (int64_t c = from; c < to; c += L) {
                         store(s + key * columns + c, splat<Vec<Acc>>(-kInfinity<Acc>));
                       }
                     });
  }

  template <int R, int NV>
  __attribute__((noinline)) void mask(Tile<Acc, R, NV>& x, int64_t key, int64_t c) const {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) {
        const int64_t column = c + v * L;
        Vec<Acc> s = x.c[r][v];
        if (!transform.plain) {
          s = transform.apply(s, key + r, load_index<Acc>(bands.end_key + column), nullptr);
        }
        x.c[r][v] = select(bands.sees(key + r, column), s, splat<Vec<Acc>>(-kInfinity<Acc>));
      }
    }
  }

  // Scores are S times `factor`: the scale, unless the transform has applied it. Maxima are of S,
  // and the difference is scaled: the exponential of a maximum is exactly 1, so that a query that
  // sees one key gets exactly its value.
  Acc factor() const { return transform.plain ? transform.scale : Acc(1); }

  void raise_maximum(bool first) {
    const Acc f = factor();
    for (int64_t c = 0; c < bands.columns; c += L) {
      const Vec<Acc> before = load(max + c);
      const Vec<Acc> now = vmax(before, load(part + c));
      const Vec<Acc> finite = vmax(now, splat<Vec<Acc>>(lowest<Acc>()));
      store(max + c, now);
      store(safe + c, finite);
      store(shrink + c, first ? Vec<Acc>{} : exp_nonpositive<Acc>((before - finite) * f));
      store(part + c, Vec<Acc>{});
    }
  }

  void exponentials(Acc* s, int64_t count) {
    const int64_t columns = bands.columns;
    const Acc f = factor();
    for (int64_t key = 0; key < count; key += kBandRows) {
      const BandGroup group =
          band_group<Acc>(key, count, columns, bands.query_begin, bands.query_end);
      const int64_t height = group.height;
      for (int64_t c = group.low; c < group.high; c += L) {
        const Vec<Acc> shift = load(safe + c);
        Vec<Acc> p_sum = load(part + c);
        Acc* x = s + key * columns + c;
        int64_t r = 0;
        for (; r + 4 <= height; r += 4) {
          Vec<Acc> p[4];
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) {
            p[u] = exp_nonpositive<Acc>((load(x + (r + u) * columns) - shift) * f);
            store(x + (r + u) * columns, p[u]);
          }
          p_sum += (p[0] + p[1]) + (p[2] + p[3]);
        }
        for (; r < height; ++r) {
          const Vec<Acc> p = exp_nonpositive<Acc>((load(x + r * columns) - shift) * f);
          store(x + r * columns, p);
          p_sum += p;
        }
        store(part + c, p_sum);
      }
    }
    for (int64_t c = 0; c < columns; c += L) {
      store(sum + c, load(sum + c) * load(shrink + c) + load(part + c));
    }
  }
};

template <class T>
struct ForwardTask : RunningSoftmax<AccOf<T>> {
  using Acc = AccOf<T>;
  using Running = RunningSoftmax<Acc>;
  using Running::bands, Running::in, Running::max, Running::shrink, Running::sum;
  static constexpr int L = kLanes<Acc>;

  const AttentionForwardArgs& a;
  int64_t b, h, i, n;  // queries [i, i + n)
  AttentionRow row;

  ForwardTask(const AttentionForwardArgs& a, int64_t b, int64_t h, int64_t i, int64_t n)
      : Running(a.in, b, h), a(a), b(b), h(h), i(i), n(n), row(a.in, b) {}

  void run() {
    alignas(64) Acc scratch[kScratchBytes / sizeof(Acc)];
    const int64_t D = in.D, kv = h / (in.NH / in.NKV);
    bands.set_queries(row, i, n);
    const int64_t columns = bands.columns, stride = row_stride<Acc>(D);
    const int64_t keys = key_block<Acc>(D, columns);
    Carve<Acc> carve{scratch};
    Acc* q = carve.take(D * columns);       // q^T [D, columns]
    Acc* o = carve.take(columns * stride);  // [queries, D], not yet divided by sum
    Acc* s = carve.take(keys * columns);    // S^T, then P^T [keys, columns]
    Acc* v = carve.take(keys * stride);     // [keys, D]
    Acc* k = carve.take(keys * stride);     // [keys, D]
    transpose_rows<Acc>(q, columns, at(static_cast<const T*>(in.q), in.q_strides, b, h, i),
                        in.q_strides.t, n, columns, D);
    for (int64_t c = 0; c < columns; ++c) max[c] = -kInfinity<Acc>, sum[c] = 0;

    const int64_t first = row.first_key(i), end = row.end_key(i + n - 1);
    for (int64_t j = first; j < end; j += keys) {
      const int64_t count = least(keys, end - j);
      bands.set_keys(row, i, j, count);
      copy_rows<Acc>(k, stride, at(static_cast<const T*>(in.k), in.k_strides, b, kv, j),
                     in.k_strides.t, count, D, Acc(1));
      copy_rows<Acc>(v, stride, at(static_cast<const T*>(in.v), in.v_strides, b, kv, j),
                     in.v_strides.t, count, D, Acc(1));
      this->scores(k, stride, q, s, j, count);
      this->raise_maximum(j == first);
      this->exponentials(s, count);
      if (in.seed) drop(s, j, count);
      band_multiply<Acc>(o, stride, shrink, j == first, s, 1, columns, v, stride, D, n, count,
                         bands.key_begin, bands.key_end);
    }
    write(o, stride);
  }

  void drop(Acc* s, int64_t j, int64_t count) {
    constexpr int64_t kKeys = 8;
    alignas(64) Acc factors[kKeys * kMostColumns];
    const int64_t columns = bands.columns;
    for (int64_t key = 0; key < count; key += kKeys) {
      const int64_t height = least(kKeys, count - key);
      dropout_factors(factors, columns, in, b, h, i, columns, j + key, height);
      for (int64_t e = 0; e < height * columns; e += L) {
        Acc* p = s + key * columns + e;
        store(p, load(p) * load(factors + e));
      }
    }
  }

  void write(const Acc* o, int64_t stride) {
    Acc* lse = static_cast<Acc*>(a.lse) + (b * in.NH + h) * in.Tq + i;
    for (int64_t r = 0; r < n; ++r) {
      T* out = at(static_cast<T*>(a.out), a.out_strides, b, h, i + r);
      const Acc inverse = Acc(1) / sum[r];
      const Acc* from = o + r * stride;
      for (int64_t d = 0; d < in.D; d += L) {
        store_part<Acc>(out + d, load(from + d) * inverse, in.D - d);
      }
      lse[r] = max[r] == kInfinity<Acc> ? max[r] : max[r] * this->factor() + log1(sum[r]);
    }
  }
};

template <class T>
void forward_block(const AttentionForwardArgs& a, int64_t task) {
  const int64_t queries = attention_query_block(a.in), heads = a.in.B * a.in.NH;
  // The last queries see the most keys: their blocks come first.
  const int64_t last = ceil_div(a.in.Tq, queries) - 1;
  const AttentionForwardBlock block(a.in, queries, task % heads, last - task / heads);
  zero_queries<T>(a, block.b, block.h, block.begin, block.first);
  zero_queries<T>(a, block.b, block.h, block.last, block.end);
  if (block.first < block.last) {
    ForwardTask<T>(a, block.b, block.h, block.first, block.last - block.first).run();
  }
}

}  // namespace

void attention_forward(const AttentionForwardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    for (int64_t task = begin; task < end; ++task) {
      forward_block<typename decltype(tag)::type>(a, task);
    }
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
