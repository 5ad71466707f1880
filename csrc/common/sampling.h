// Sampling the next token: the arithmetic and the algorithm, for host and device alike.
//
// Probabilities are integers here, "masses": exp((y - max y) / temperature) in units of 2^-44
// (fewer bits for vocabularies beyond 2^19), computed in float32. Integers add up to the same sum
// in any order, so a block of threads, a vector of lanes and a loop take the same decisions, and
// the draw is exact in them. Every product and sum of floats is rounded by itself: files including
// this are compiled without contraction into fused multiply-adds (CMakeLists.txt).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/philox.h"
#include "ops/sample.h"

namespace seqkern {

template <class To, class From>
SEQKERN_HD_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// ---------------------------------------------------------------- scores and their order

struct Penalties {
  float repetition, presence, frequency;
};

// y of a logit whose token was seen `count` times. The sum with 0 makes -0 and 0 the same score.
SEQKERN_HD_INLINE float score_of(float x, int32_t count, const Penalties& penalties) {
  if (count > 0) {
    x = x > 0 ? x / penalties.repetition : x * penalties.repetition;
    x = x - penalties.frequency * static_cast<float>(count);
    x = x - penalties.presence;
  }
  return x + 0.0f;
}

// A key that grows with the score.
SEQKERN_HD_INLINE uint32_t key_of(float y) {
  const uint32_t u = bits_as<uint32_t>(y);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
SEQKERN_HD_INLINE float score_of_key(uint32_t key) {
  return bits_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// ---------------------------------------------------------------- masses

struct MassUnit {
  int bits;  // the mass of the largest score is 2^bits

  // The sum over V masses must stay below 2^63, a mass below 2^52 (where it is rounded).
  SEQKERN_HD_INLINE static MassUnit of_vocabulary(int64_t V) {
    int bits = 44;
    while (bits > 0 && (V >> (63 - bits)) > 0) --bits;
    return {bits};
  }
};

// 2^(t + bits) for t <= 0 with a relative error below 2^-23, and 0 or less than 2^-15 for t <= -60.
// V: float or a vector of floats; U: its unsigned integers.
template <class U, class V>
SEQKERN_HD_INLINE V scaled_power(V t, MassUnit unit) {
  // Adding 1.5 * 2^23 rounds to an integer in the low bits of the mantissa; 127 + bits more makes
  // those the exponent of 2^(n + bits).
  const float round = 12582912.0f + 127.0f + static_cast<float>(unit.bits);
  const V lowest = V{} - 60.0f;
  t = t > lowest ? t : lowest;
  const V shifted = t + round;
  const V r = t - (shifted - round);  // exact
  // The polynomial of the smallest relative error on [-1/2, 1/2], 2^-29, of those that are 1 at 0.
  constexpr float kPower[] = {1.0f,
                              0.6931471824645996f,
                              0.24022647738456726f,
                              0.055503323674201965f,
                              0.00961843691766262f,
                              0.0013398875016719103f,
                              0.00015353361959569156f};
  V p = V{} + kPower[6];
  SEQKERN_UNROLL
  for (int i = 5; i >= 0; --i) p = p * r + kPower[i];
  return p * bits_as<V>(bits_as<U>(shifted) << 23);
}

// The integer nearest to x, 0 <= x < 2^52; the even one of two.
SEQKERN_HD_INLINE uint64_t nearest_integer(float x) {
  constexpr float kTwo23 = 8388608.0f;
  const uint32_t below = bits_as<uint32_t>(x + kTwo23) - bits_as<uint32_t>(kTwo23);
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t mantissa = (u & 0x7fffffu) | 0x800000u;
  // From 2^23 on a float is an integer.
  return x < kTwo23 ? below : static_cast<uint64_t>(mantissa) << (((u >> 23) - 150) & 63);
}

// ---------------------------------------------------------------- what is summed over a row

// The tokens that stay: those of a key above `key`, those of that key with an id up to `last_tie`,
// and of them those whose mass is at least min_mass.
struct Kept {
  uint32_t key = 0;
  int64_t last_tie = INT64_MAX;
  uint64_t min_mass = 0;
};

struct Measure {
  bool mass;  // or 1 per token
  bool ties;  // only those of exactly kept.key
  Kept kept;
  float max;    // largest score
  float scale;  // log2(e) / temperature, finite: 0 times it must be 0
  MassUnit unit;

  // A token's mass before it is rounded to an integer.
  template <class U, class V>
  SEQKERN_HD_INLINE V exact_mass(V y) const {
    return scaled_power<U>((y - max) * scale, unit);
  }
  SEQKERN_HD_INLINE uint64_t mass_at(float y) const {
    return nearest_integer(exact_mass<uint32_t>(y));
  }
  SEQKERN_HD_INLINE uint64_t of(float y, int64_t v) const {
    const uint32_t key = key_of(y);
    if (key < kept.key) return 0;
    return filtered(key, v, mass ? mass_at(y) : 1);
  }
  // What is left of a token's amount.
  SEQKERN_HD_INLINE uint64_t filtered(uint32_t key, int64_t v, uint64_t amount) const {
    const bool tie = key == kept.key;
    const bool stays = ties ? tie : key > kept.key || (tie && v <= kept.last_tie);
    return stays && amount >= kept.min_mass ? amount : 0;
  }
};

// Where a sum over tokens of falling score reaches what is needed: among those of `key`, of which
// still `rest` (at least 1) is needed.
struct Reached {
  uint32_t key;
  uint64_t rest;
};

// Keys are searched by their bits from the top, a histogram at a time.
inline constexpr int kRadixLevels = 3;
inline constexpr int kRadixBins = 1 << 11;  // 11, 11 and 10 bits

struct RadixLevel {
  int shift;
  int bins;
  uint32_t settled;  // mask of the bits that earlier levels have found

  SEQKERN_HD_INLINE explicit RadixLevel(int level)
      : shift(level == 0   ? 21
              : level == 1 ? 10
                           : 0),
        bins(level == 2 ? kRadixBins / 2 : kRadixBins),
        settled(level == 0   ? 0
                : level == 1 ? ~0u << 21
                             : ~0u << 10) {}
  SEQKERN_HD_INLINE int bin_of(uint32_t key) const {
    return static_cast<int>(key >> shift) & (bins - 1);
  }
};

// ---------------------------------------------------------------- the algorithm

// floor(a * b / 2^64)
SEQKERN_HD_INLINE uint64_t high_product(uint64_t a, uint64_t b) {
  const uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  const uint64_t other = a0 * b1 + (middle & 0xffffffffu);
  return a1 * b1 + (middle >> 32) + (other >> 32);
}

// Natural logarithm of a sum of masses, in units of the largest.
SEQKERN_HD_INLINE double log_of(uint64_t sum, MassUnit unit) {
  return ::log(static_cast<double>(sum)) - unit.bits * 0.69314718055994530942;
}

// The log-probability of a token of score y among those whose masses are `sum`.
SEQKERN_HD_INLINE double log_probability(const Measure& mass, float y, uint64_t sum) {
  const double t = (static_cast<double>(y) - mass.max) * mass.scale;
  return t * 0.69314718055994530942 - log_of(sum, mass.unit);
}

// The smallest integer not below x.
SEQKERN_HD_INLINE uint64_t round_up(double x) {
  const uint64_t below = static_cast<uint64_t>(x);
  return static_cast<double>(below) < x ? below + 1 : below;
}

// Neither NaN nor infinite: a row without such a largest score has no distribution.
SEQKERN_HD_INLINE bool is_finite(float max) { return max - max == 0; }

SEQKERN_HD_INLINE Measure masses_of(float max, double temperature, int64_t V) {
  constexpr double kLog2E = 1.44269504088896340736, kMost = 3e38;
  // Below 0 and NaN (only on the device, where nobody looks): all tokens are alike.
  const double scale = temperature > kLog2E / kMost ? kLog2E / temperature
                       : temperature > 0            ? kMost
                                                    : 0;
  return {.mass = true,
          .ties = false,
          .kept = {},
          .max = max,
          .scale = static_cast<float>(scale),
          .unit = MassUnit::of_vocabulary(V)};
}

// Tokens stay as long as the sum before them is below top_p of all: up to the first with which the
// sum reaches this.
SEQKERN_HD_INLINE uint64_t need_of_top_p(double top_p, uint64_t sum) {
  const uint64_t need = round_up(top_p * static_cast<double>(sum));
  return need < 1 ? 1 : need > sum ? sum : need;
}

// How many tokens of reached.key it takes to reach the rest.
SEQKERN_HD_INLINE uint64_t tokens_for(const Measure& mass, const Reached& reached) {
  const uint64_t each = mass.mass_at(score_of_key(reached.key));
  return (reached.rest + each - 1) / each;
}

// A value on the device may be out of range: above 1 it is 1, so that the largest score always
// stays.
SEQKERN_HD_INLINE uint64_t least_mass(double min_p, MassUnit unit) {
  if (!(min_p > 0)) return 0;
  const uint64_t largest = uint64_t{1} << unit.bits;
  return min_p < 1 ? round_up(min_p * static_cast<double>(largest)) : largest;
}

// What the running sum of the token drawn is the first to exceed.
SEQKERN_HD_INLINE uint64_t draw_target(const SampleArgs& args, int64_t b, uint64_t sum) {
  const PhiloxBits bits =
      philox(static_cast<uint64_t>(args.seed.at(b)), static_cast<uint64_t>(args.step.at(b)),
             args.seed.rows ? 0 : static_cast<uint64_t>(b));
  return high_product(static_cast<uint64_t>(bits.word[0]) << 32 | bits.word[1], sum);
}

struct Drawn {
  int64_t token;
  double logprob;
};

// A Row gives sums over one row's tokens; on a GPU the threads that share the row call it together:
//   max()                     largest score; NaN if there is NaN
//   total(measure)            sum over the tokens
//   locate(measure, target)   after total(measure): the first id at which the running sum exceeds
//                             target
//   reach(measure, need)      where the sum reaches need(total), 1 <= need <= total
//   score(v)
template <class Row>
SEQKERN_HD_INLINE Drawn draw_token(Row& row, const SampleArgs& args, int64_t b) {
  const float max = row.max();
  if (!is_finite(max)) return {-1, __builtin_nan("")};
  const double temperature = args.temperature.at(b);
  Measure mass = masses_of(max, temperature, args.V);
  Measure ties = mass;
  ties.mass = false;
  ties.ties = true;
  if (temperature == 0) {
    ties.kept.key = key_of(max);
    row.total(ties);
    return {row.locate(ties, 0), 0};
  }
  // The id of the last token that stays, where only `count` of those of kept.key do.
  const auto cut_ties = [&](uint32_t key, uint64_t count) {
    ties.kept.key = key;
    mass.kept.key = key;
    mass.kept.last_tie = INT64_MAX;
    if (count < row.total(ties)) mass.kept.last_tie = row.locate(ties, count - 1);
  };
  const int64_t k = args.top_k.at(b);
  if (k > 0 && k < args.V) {
    Measure count = mass;
    count.mass = false;
    const Reached reached = row.reach(count, [=](uint64_t) { return static_cast<uint64_t>(k); });
    cut_ties(reached.key, reached.rest);
  }
  const double top_p = args.top_p.at(b);
  if (top_p < 1) {
    const Reached reached =
        row.reach(mass, [=](uint64_t sum) { return need_of_top_p(top_p, sum); });
    const int64_t earlier_cut = reached.key == mass.kept.key ? mass.kept.last_tie : INT64_MAX;
    cut_ties(reached.key, tokens_for(mass, reached));
    // Both cuts among the same ties: the earlier id holds.
    if (earlier_cut < mass.kept.last_tie) mass.kept.last_tie = earlier_cut;
  }
  mass.kept.min_mass = least_mass(args.min_p.at(b), mass.unit);
  const uint64_t sum = row.total(mass);
  const int64_t token = row.locate(mass, draw_target(args, b, sum));
  return {token, log_probability(mass, row.score(token), sum)};
}

// log softmax(x)[token], for the row of the bare logits.
template <class Row>
SEQKERN_HD_INLINE double log_softmax_of(Row& row, int64_t V, int64_t token) {
  const Measure mass = masses_of(row.max(), 1, V);
  return log_probability(mass, row.score(token), row.total(mass));
}

}  // namespace seqkern
