// A block of queries and a block of keys in attention's backward: the weights of the pair, and the
// gradients of its scores. In the precision of sums, whatever the tensors hold.
#pragma once

#include "cpu/attention.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class Acc>
struct AttentionBlockPair {
  static constexpr int L = kLanes<Acc>;

  const AttentionInputs& in;
  int64_t stride;
  Bands<Acc> bands;
  alignas(64) Acc lse[kMostColumns];
  alignas(64) Acc delta[kMostColumns];  // sum of dout * out
  alignas(64) Acc dlse[kMostColumns];
  Acc *q_columns, *dout_columns;  // the queries, transposed [D, columns]
  Acc *k_rows, *v_rows;           // the keys [keys, stride]
  Acc *p, *ds, *cap, *dropped;    // [keys, columns]: weights, score gradients, and for the options

  explicit AttentionBlockPair(const AttentionInputs& in) : in(in) {}

  // P^T = exp(S^T - lse), zero where not visible.
  void weights(const Transform<Acc>& transform, int64_t j, int64_t count) {
    const int64_t columns = bands.columns;
    const Acc factor = transform.plain ? transform.scale : Acc(1);
    band_tiles<Acc>(k_rows, stride, q_columns, columns, in.D, count, columns, bands.query_begin,
                    bands.query_end,
                    [&]<int R, int NV>(const Tile<Acc, R, NV>& tile, int64_t key, int64_t c)
                        __attribute__((always_inline)) {
                          const bool whole = bands.full(j + key, R, c, NV * L);
                          Acc* to = p + key * columns + c;
                          if (transform.plain && whole) {
#pragma GCC unroll 4
                            for (int v = 0; v < NV; ++v) {
                              const Vec<Acc> shift = load(lse + c + v * L);
#pragma GCC unroll 8
                              for (int r = 0; r < R; ++r) {
                                store(to + r * columns + v * L,
                                      exp_nonpositive<Acc>(tile.c[r][v] * factor - shift));
                              }
                            }
                          } else {
                            masked_weights(tile, transform, factor, j + key, c, to,
                                           cap ? cap + key * columns + c : nullptr);
                          }
                        });
    beside_band<Acc>(count, columns, bands.query_begin, bands.query_end,
                     [&](int64_t key, int64_t from, int64_t to) {
                       for (int64_t c = from; c < to; c += L) {
                         store(p + key * columns + c, Vec<Acc>{});
                         store(ds + key * columns + c, Vec<Acc>{});
                         if (cap) store(cap + key * columns + c, Vec<Acc>{});
                       }
                     });
  }

  template <int R, int NV>
  __attribute__((noinline)) void masked_weights(Tile<Acc, R, NV> tile,
                                                const Transform<Acc>& transform, Acc factor,
                                                int64_t key, int64_t c, Acc* to, Acc* cap_to) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) {
        const int64_t at_rv = r * bands.columns + v * L, column = c + v * L;
        Vec<Acc> s = tile.c[r][v];
        if (!transform.plain) {
          s = transform.apply(s, key + r, load_index<Acc>(bands.end_key + column),
                              cap_to ? cap_to + at_rv : nullptr);
        }
        // A score that is not visible may lie far above the log-sum-exp of those that are.
        s = select(bands.sees(key + r, column), s * factor - load(lse + column),
                   splat<Vec<Acc>>(-kInfinity<Acc>));
        store(to + at_rv, exp_nonpositive<Acc>(s));
      }
    }
  }

  // dS^T = P^T (dP^T - delta + dlse), dP^T = V dout^T.
  void score_gradients(int64_t count) {
    const int64_t columns = bands.columns;
    const bool options = in.seed || in.softcap > 0;
    band_tiles<Acc>(v_rows, stride, dout_columns, columns, in.D, count, columns, bands.query_begin,
                    bands.query_end,
                    [&]<int R, int NV>(const Tile<Acc, R, NV>& tile, int64_t key, int64_t c)
                        __attribute__((always_inline)) {
                          if (options) {
                            score_gradients_with_options(tile, key, c);
                            return;
                          }
#pragma GCC unroll 4
                          for (int v = 0; v < NV; ++v) {
                            const Vec<Acc> d = load(delta + c + v * L), g = load(dlse + c + v * L);
#pragma GCC unroll 8
                            for (int r = 0; r < R; ++r) {
                              const int64_t at_rv = (key + r) * columns + c + v * L;
                              store(ds + at_rv, load(p + at_rv) * ((tile.c[r][v] - d) + g));
                            }
                          }
                        });
  }

  template <int R, int NV>
  __attribute__((noinline)) void score_gradients_with_options(Tile<Acc, R, NV> tile, int64_t key,
                                                              int64_t c) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) {
        const int64_t at_rv = (key + r) * bands.columns + c + v * L;
        Vec<Acc> weight = load(p + at_rv), dp = tile.c[r][v];
        if (in.seed) {
          const Vec<Acc> keep = load(dropped + at_rv);
          dp *= keep;
          store(p + at_rv, weight * keep);
        }
        if (in.softcap > 0) weight *= load(cap + at_rv);
        store(ds + at_rv, weight * ((dp - load(delta + c + v * L)) + load(dlse + c + v * L)));
      }
    }
  }

  // Without a gradient of the output.
  void score_gradients_of_lse(int64_t count) {
    const int64_t columns = bands.columns;
    for (int64_t key = 0; key < count; ++key) {
      for (int64_t c = 0; c < columns; c += L) {
        const int64_t at_c = key * columns + c;
        Vec<Acc> weight = load(p + at_c);
        if (in.softcap > 0) weight *= load(cap + at_c);
        store(ds + at_c, weight * load(dlse + c));
      }
    }
  }
};

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
