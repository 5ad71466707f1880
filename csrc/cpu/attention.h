// What forward and backward of attention share: tensors by head, the bands of a pair of blocks,
// scores as the options make them, dropout.
#pragma once

#include "cpu/attention_plan.h"
#include "cpu/attention_tile.h"
#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Scratch of a task, on its thread's stack.
inline constexpr int64_t kScratchBytes = 256 * 1024;
inline constexpr int64_t kMostColumns = 96 + 16;  // of a block, with what vectors add

template <class Acc>
constexpr Acc lowest() {
  return sizeof(Acc) == 4 ? static_cast<Acc>(-3.402823466e+38F)
                          : static_cast<Acc>(-1.7976931348623157e+308);
}
template <class Acc>
inline constexpr Acc kInfinity = static_cast<Acc>(__builtin_inf());

// Position t of head h of batch row b.
template <class P>
SEQKERN_INLINE P* at(P* base, const HeadStrides& s, int64_t b, int64_t h, int64_t t) {
  return base + b * s.b + h * s.h + t * s.t;
}

// Hands out a buffer piece by piece, each on its own cache line.
template <class Acc>
struct Carve {
  Acc* next;
  Acc* take(int64_t n) {
    Acc* piece = next;
    next += (n + 15) / 16 * 16;
    return piece;
  }
};

// ---------------------------------------------------------------- bands

// A block of queries against a block of keys: which part of the block [keys, queries] is visible.
template <class Acc>
struct Bands {
  int64_t queries, columns;  // columns: queries in whole vectors
  // Per column, the keys it sees; columns beyond the last query repeat it.
  alignas(64) Index<Acc> first_key[kMostColumns], end_key[kMostColumns];
  // The same as 32-bit integers relative to the block of keys, clipped: bands of query rows.
  int32_t key_begin[kMostColumns], key_end[kMostColumns];
  // Per key of the block, the queries that see it, relative to the first query.
  int32_t query_begin[kMostColumns], query_end[kMostColumns];

  void set_queries(const AttentionRow& row, int64_t i, int64_t n) {
    queries = n;
    columns = round_up<Acc>(n);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t q = i + least(c, n - 1);
      first_key[c] = static_cast<Index<Acc>>(row.first_key(q));
      end_key[c] = static_cast<Index<Acc>>(row.end_key(q));
    }
  }

  // Keys [j, j + n), after set_queries of [i, ..).
  void set_keys(const AttentionRow& row, int64_t i, int64_t j, int64_t n) {
    for (int64_t c = 0; c < queries; ++c) {
      key_begin[c] = static_cast<int32_t>(most<int64_t>(first_key[c] - j, 0));
      key_end[c] = static_cast<int32_t>(least<int64_t>(end_key[c] - j, n));
    }
    for (int64_t k = 0; k < n; ++k) {
      query_begin[k] = static_cast<int32_t>(most<int64_t>(row.first_query(j + k) - i, 0));
      query_end[k] = static_cast<int32_t>(least(row.end_query(j + k) - i, queries));
    }
  }

  // Whether every column of [c, c + n) sees keys [j, j + rows).
  bool full(int64_t j, int64_t rows, int64_t c, int64_t n) const {
    return first_key[c + n - 1] <= j && end_key[c] >= j + rows;
  }

  inline __attribute__((always_inline)) IndexVec<Acc> sees(int64_t j, int64_t c) const {
    const IndexVec<Acc> key = IndexVec<Acc>{} + static_cast<Index<Acc>>(j);
    return (load_index<Acc>(first_key + c) <= key) & (load_index<Acc>(end_key + c) > key);
  }
};

// ---------------------------------------------------------------- scores

// Softcap and ALiBi of a head: what is between a scaled product and a score.
template <class Acc>
struct Transform {
  Acc scale, softcap, slope;
  bool plain;  // scores are the products times a scale > 0

  Transform(const AttentionInputs& in, int64_t b, int64_t h)
      : scale(static_cast<Acc>(in.scale)),
        softcap(static_cast<Acc>(in.softcap)),
        slope(in.alibi_slopes ? in.alibi_slopes[b * in.alibi_batch_stride + h] : 0),
        plain(in.softcap == 0 && !in.alibi_slopes && in.scale > 0) {}

  // Scores of key j and the queries whose end_key is given; the cap's derivative where wanted.
  inline __attribute__((always_inline)) Vec<Acc> apply(Vec<Acc> x, int64_t j, IndexVec<Acc> end_key,
                                                       Acc* derivative) const {
    x *= scale;
    if (softcap > 0) {
      const TanhResult<Vec<Acc>> t = tanh_with_derivative(x / softcap);
      x = t.value * softcap;
      if (derivative) store(derivative, t.derivative);
    }
    if (slope != 0) {
      const IndexVec<Acc> distance = end_key - static_cast<Index<Acc>>(j + 1);
      x -= slope * __builtin_convertvector(distance, Vec<Acc>);
    }
    return x;
  }
};

// ---------------------------------------------------------------- dropout

SEQKERN_INLINE VecU64 multiply_even(VecU32 a, VecU32 b) {
#if SEQKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif SEQKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif SEQKERN_VECTOR_BYTES == 16 && defined(__SSE2__)
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (VecU64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return ((VecU64)a & 0xffffffffu) * ((VecU64)b & 0xffffffffu);
#endif
}

// Low and high words of the products with a constant.
struct Product {
  VecU32 low, high;
};
SEQKERN_INLINE Product multiply(VecU32 a, uint32_t constant) {
  const VecU32 m = VecU32{} + constant;
  const VecU64 even = multiply_even(a, m);
  const VecU64 odd = multiply_even((VecU32)((VecU64)a >> 32), m);
  constexpr uint64_t kLow = 0xffffffffu;
  return {(VecU32)((even & kLow) | (odd << 32)), (VecU32)((even >> 32) | (odd & ~kLow))};
}

// attention_dropout_bits of queries i, i + 1, .. and one block of four keys (common/philox.h says
// what it computes).
struct DropoutBits {
  VecU32 word[4];
};
SEQKERN_INLINE DropoutBits dropout_bits(uint64_t seed, uint64_t row, int64_t i, int64_t block) {
  VecU32 lane;
  for (int l = 0; l < kLanes<float>; ++l) lane[l] = static_cast<uint32_t>(l);
  VecU32 c0 = VecU32{} + static_cast<uint32_t>(block);
  VecU32 c1 = lane + static_cast<uint32_t>(i);
  VecU32 c2 = VecU32{} + static_cast<uint32_t>(row);
  VecU32 c3 = VecU32{} + static_cast<uint32_t>(row >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply(c0, 0xD2511F53u), p1 = multiply(c2, 0xCD9E8D57u);
    c0 = p1.high ^ c1 ^ key0;
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ key1;
    c3 = p0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What dropout multiplies the weights of a block by: 0 or 1 / (1 - p), into Acc [keys, stride].
template <class Acc>
void dropout_factors(Acc* to, int64_t stride, const AttentionInputs& in, int64_t b, int64_t h,
                     int64_t i, int64_t columns, int64_t j, int64_t keys) {
  constexpr int F = kLanes<float>;
  const uint64_t seed = static_cast<uint64_t>(*in.seed);
  const uint64_t row = static_cast<uint64_t>(b * in.NH + h);
  const uint32_t threshold = dropout_threshold(in.dropout_p);
  const Acc kept = static_cast<Acc>(1 / (1 - in.dropout_p));
  for (int64_t block = j / 4; block * 4 < j + keys; ++block) {
    for (int64_t c = 0; c < columns; c += F) {
      const DropoutBits bits = dropout_bits(seed, row, i + c, block);
      for (int n = 0; n < 4; ++n) {
        const int64_t k = block * 4 + n - j;
        if (k < 0 || k >= keys) continue;
        for (int l = 0; l < F && c + l < columns; ++l) {
          to[k * stride + c + l] = bits.word[n][l] >= threshold ? kept : Acc(0);
        }
      }
    }
  }
}

// Queries that are padding.
template <class T>
void zero_queries(const AttentionForwardArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  for (int64_t i = begin; i < end; ++i) {
    T* out = at(static_cast<T*>(a.out), a.out_strides, b, h, i);
    for (int64_t d = 0; d < a.in.D; ++d) store1(out + d, Acc(0));
    static_cast<Acc*>(a.lse)[(b * a.in.NH + h) * a.in.Tq + i] = -kInfinity<Acc>;
  }
}

}  // namespace
}  // namespace seqkern::cpu::SEQKERN_ISA
