// d w for some rows of d and a large matrix w whose rows lie one after the other: from the top of w
// to its bottom a few rows at a time, which all rows of d meet while a cache holds them.
//
// Tiles that each went through all of w would read its rows again for every few rows of d: pages
// apart, a page and some lines of it for each.
#pragma once

#include "common/host_device.h"
#include "cpu/gemm_tile.h"

namespace seqkern::cpu::SEQKERN_ISA {

template <class T>
struct DepthProduct {
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;
  static constexpr int64_t kDepth = 32;  // rows of w at a time
  static constexpr int64_t kSteps = 8;   // of them before more is asked for

  int64_t B, K;
  const Acc* d;  // [B, K], its rows d_row apart
  int64_t d_row;
  const T* w;  // [K, columns], its rows w_row apart; columns are whole vectors
  int64_t w_row, columns;
  int64_t row;   // of scratch, at least `columns`, in whole tiles
  Acc* scratch;  // scratch_size(B, row)

  static int64_t scratch_size(int64_t B, int64_t row) { return (2 * B + kDepth) * row; }

  // The products [B, row], summed in the chains of multiply_in_chains.
  const Acc* run() const {
    const int64_t chains = ceil_div<int64_t>(K, kProductChain),
                  length = ceil_div<int64_t>(K, chains);
    for (int64_t begin = 0; begin < K; begin += length) {
      const int64_t end = K - begin < length ? K : begin + length;
      for (int64_t k = begin; k < end; k += kDepth) {
        const int64_t depth = end - k < kDepth ? end - k : kDepth;
        pack(k, depth);
        add(k, depth, {.of_chain = k == begin, .of_all = begin == 0}, k + depth == end);
      }
    }
    return totals();
  }

 private:
  struct First {
    bool of_chain, of_all;
  };

  Acc* totals() const { return scratch; }
  Acc* chain() const { return scratch + B * row; }  // what the present chain has so far
  Acc* packed() const { return scratch + 2 * B * row; }

  // Rows [k, k + depth) of w as panels for the tiles.
  void pack(int64_t k, int64_t depth) const {
    for (int64_t r = 0; r < depth; ++r) {
      const T* from = w + (k + r) * w_row;
      for (int64_t i = 0; i < columns; i += kPanel<Acc>) {
        const int64_t some = columns - i < kPanel<Acc> ? columns - i : kPanel<Acc>;
        Acc* to = packed() + i * kDepth + r * some;
        for (int64_t e = 0; e < some; e += L) store(to + e, load(from + i + e));
      }
    }
  }

  // Their products with all rows of d.
  void add(int64_t k, int64_t depth, First first, bool is_last) const {
    const int64_t tiles = ceil_div<int64_t>(columns, kPanel<Acc>) * ceil_div<int64_t>(B, kTileRows);
    const int64_t next = K - k - depth;
    Ahead ahead(w + (k + depth) * w_row, w_row, columns, next < kDepth ? next : kDepth,
                tiles * ceil_div<int64_t>(depth, kSteps));
    for (int64_t i = 0; i < columns; i += kPanel<Acc>) {
      const int64_t vectors = columns - i < kPanel<Acc> ? (columns - i) / L : kTileVectors;
      for (int64_t b = 0; b < B; b += kTileRows) {
        const int64_t at = b * row + i;
        with_tile_rows(B - b < kTileRows ? B - b : kTileRows,
                       [&](auto R) __attribute__((always_inline)) {
                         with_vectors(vectors, [&](auto NV) __attribute__((always_inline)) {
                           add_tile<decltype(R)::value, decltype(NV)::value>(
                               d + b * d_row + k, packed() + i * kDepth, depth, ahead, first,
                               chain() + at, is_last ? totals() + at : nullptr);
                         });
                       });
      }
    }
  }

  // Asks for the next rows of w, so many lines at a time that `calls` of fetch ask for all.
  struct Ahead {
    static constexpr int64_t kLine = 64 / sizeof(T);
    const T* from;
    int64_t w_row, columns, rows, lines, at = 0;

    Ahead(const T* from, int64_t w_row, int64_t columns, int64_t rows, int64_t calls)
        : from(from),
          w_row(w_row),
          columns(columns),
          rows(rows),
          lines(ceil_div<int64_t>(rows * ceil_div<int64_t>(columns, kLine), calls)) {}

    __attribute__((always_inline)) void fetch() {
      for (int64_t n = 0; n < lines && rows > 0; ++n) {
        __builtin_prefetch(from + at, 0, 2);
        at += kLine;
        if (at >= columns) at = 0, from += w_row, --rows;
      }
    }
  };

  // A tile of the chain, or where that ends of `total`.
  template <int R, int NV>
  __attribute__((noinline)) void add_tile(const Acc* d_k, const Acc* panel, int64_t depth,
                                          Ahead& ahead, First first, Acc* so_far,
                                          Acc* total) const {
    Tile<Acc, R, NV> tile = {};
    if (!first.of_chain) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) tile.c[r][j] = load(so_far + r * row + j * L);
      }
    }
    for (int64_t k = 0; k < depth; k += kSteps) {
      ahead.fetch();
      multiply_add(tile, d_k + k, d_row, 1, panel + k * NV * L,
                   depth - k < kSteps ? depth - k : kSteps);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        const int64_t at = r * row + j * L;
        if (!total) {
          store(so_far + at, tile.c[r][j]);
        } else {
          store(total + at, first.of_all ? tile.c[r][j] : load(total + at) + tile.c[r][j]);
        }
      }
    }
  }
};

}  // namespace seqkern::cpu::SEQKERN_ISA
