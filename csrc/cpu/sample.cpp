// Sampling the next token: sums over a row of scores, for the algorithm of common/sampling.h.
#include "common/sampling.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

constexpr int kBlock = 256;   // scores staged at a time: 1 KB, and 2 KB of masses
constexpr int kChunks = 256;  // parts of a row whose sums are kept, so that a search reads one
constexpr int kRuns =
    4096;  // runs of blocks whose largest score is kept, so that others are skipped

template <class I>
SEQKERN_INLINE bool any(I mask) {
  uint64_t words[sizeof(mask) / 8];
  __builtin_memcpy(words, &mask, sizeof(mask));
  uint64_t all = 0;
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// The bin with which the sum from `bin` down reaches rest, of which then what is left of it
// remains.
SEQKERN_INLINE int highest_reaching(const uint64_t* histogram, int bin, uint64_t& rest) {
  for (; histogram[bin] < rest; --bin) rest -= histogram[bin];
  return bin;
}

// nearest_integer of each, and 0 for those below `least`. In double, where one addition rounds to
// an integer in the mantissa.
SEQKERN_INLINE void round_to_amounts(VecF exact, uint64_t least, uint64_t* amounts) {
  constexpr int L = kLanes<double>;
  for (int half = 0; half < 2; ++half) {
    HalfVecF floats;
    __builtin_memcpy(&floats, reinterpret_cast<const float*>(&exact) + half * L, sizeof(floats));
    const VecD rounded = in_double(floats) + 4503599627370496.0;  // 2^52
    VecU64 amount = bitcast<VecU64>(rounded) & 0xfffffffffffffull;
    amount &= bitcast<VecU64>(bitcast<VecI64>(amount) >= VecI64{} + static_cast<int64_t>(least));
    __builtin_memcpy(amounts + half * L, &amount, sizeof(amount));
  }
}

template <class T>
class Row {
 public:
  Row(const T* x, const int32_t* counts, const Penalties& penalties, int64_t V)
      : x_(x),
        counts_(counts),
        penalties_(penalties),
        V_(V),
        chunk_(ceil_div<int64_t>(V, kChunks * kBlock) * kBlock),
        run_(ceil_div<int64_t>(V, kRuns * kBlock) * kBlock) {}

  float score(int64_t v) const {
    return score_of(static_cast<float>(load1(x_ + v)), counts_ ? counts_[v] : 0, penalties_);
  }

  float max() {
    float largest = score(0);
    VecI32 nan = {};
    for (int64_t first = 0; first < V_; first += run_) {
      VecF of_run = splat<VecF>(-__builtin_inff());
      for (int64_t b = first; b < first + run_ && b < V_; b += kBlock) {
        const int n = stage(b);
        for (int i = 0; i < n; i += kLanes<float>) {
          const VecF y = load(y_ + i);
          of_run = vmax(y, of_run);
          nan |= y != y;
        }
      }
      const float y = hmax(of_run);
      run_max_[first / run_] = y;
      largest = y > largest ? y : largest;
    }
    max_ = largest;
    return any(nan) ? __builtin_nanf("") : largest;
  }

  uint64_t total(const Measure& measure) {
    uint64_t sum = 0;
    for (int64_t first = 0, c = 0; first < V_; first += chunk_, ++c) {
      uint64_t of_chunk = 0;
      for (int64_t b = first; b < first + chunk_ && b < V_; b += kBlock) {
        const int n = amounts(measure, b, measure.kept.key);
        for (int i = 0; i < n; ++i) of_chunk += amount_[i];
      }
      sums_[c] = of_chunk;
      sum += of_chunk;
    }
    return sum;
  }

  int64_t locate(const Measure& measure, uint64_t target) {
    int64_t first = 0;
    for (int c = 0; sums_[c] <= target; ++c, first += chunk_) target -= sums_[c];
    for (;; first += kBlock) {
      const int n = amounts(measure, first, measure.kept.key);
      for (int i = 0; i < n; ++i) {
        if (amount_[i] > target) return first + i;
        target -= amount_[i];
      }
    }
  }

  template <class Need>
  Reached reach(const Measure& measure, Need need) {
    uint64_t histogram[kRadixBins];
    uint32_t least_key = measure.kept.key;
    Reached reached{.key = 0, .rest = 0};
    if (!measure.mass) {
      reached.rest = need(V_);
      const uint32_t bound = key_of_count(histogram, reached.rest);
      least_key = bound > least_key ? bound : least_key;
    }
    for (int l = 0; l < kRadixLevels; ++l) {
      const RadixLevel level(l);
      const uint32_t floor_key = reached.key > least_key ? reached.key : least_key;
      for (int bin = 0; bin < level.bins; ++bin) histogram[bin] = 0;
      int highest = l == 0 ? level.bin_of(key_of(max_)) : 0;  // bin that holds anything
      for (int64_t first = 0; first < V_; first += kBlock) {
        if (l == 0) {
          const int n = amounts(measure, first, floor_key);
          for (int i = 0; i < n; ++i) histogram[level.bin_of(key_of(y_[i]))] += amount_[i];
        } else {
          // Few vectors have a score with the bits found so far. A bound that is NaN excludes none.
          const int n = may_reach(first, floor_key) ? stage(first) : 0;
          const VecF low = splat<VecF>(score_of_key(reached.key));
          const VecF high = splat<VecF>(score_of_key(reached.key | ~level.settled));
          for (int i = 0; i < n; i += kLanes<float>) {
            const VecF y = load(y_ + i);
            if (!any(~((y < low) | (y > high)))) continue;
            for (int j = i; j < i + kLanes<float> && j < n; ++j) {
              const uint32_t key = key_of(y_[j]);
              if ((key & level.settled) != reached.key) continue;
              const int bin = level.bin_of(key);
              highest = bin > highest ? bin : highest;
              histogram[bin] += measure.of(y_[j], first + j);
            }
          }
        }
      }
      if (l == 0 && measure.mass) {
        uint64_t sum = 0;
        for (int bin = 0; bin <= highest; ++bin) sum += histogram[bin];
        reached.rest = need(sum);
      }
      const int bin = highest_reaching(histogram, highest, reached.rest);
      reached.key |= static_cast<uint32_t>(bin) << level.shift;
    }
    return reached;
  }

 private:
  // A key that at least `count` tokens reach, from the runs' largest scores; 0 where there are
  // fewer runs.
  uint32_t key_of_count(uint64_t* histogram, uint64_t count) const {
    const int64_t runs = ceil_div(V_, run_);
    if (count > static_cast<uint64_t>(runs)) return 0;
    uint32_t found = 0;
    for (int l = 0; l < kRadixLevels; ++l) {
      const RadixLevel level(l);
      for (int bin = 0; bin < level.bins; ++bin) histogram[bin] = 0;
      for (int64_t run = 0; run < runs; ++run) {
        const uint32_t key = key_of(run_max_[run]);
        if ((key & level.settled) == found) ++histogram[level.bin_of(key)];
      }
      const int bin = highest_reaching(histogram, level.bins - 1, count);
      found |= static_cast<uint32_t>(bin) << level.shift;
    }
    return found;
  }

  bool may_reach(int64_t first, uint32_t floor_key) const {
    return key_of(run_max_[first / run_]) >= floor_key;
  }

  // Scores of tokens [first, first + n) to y_, the last vector filled up with its last score.
  int stage(int64_t first) {
    constexpr int L = kLanes<float>;
    const int n = V_ - first < kBlock ? static_cast<int>(V_ - first) : kBlock;
    int i = 0;
    if constexpr (!std::is_same_v<T, double>) {
      if (!counts_) {
        for (; i + L <= n; i += L) store(y_ + i, load(x_ + first + i) + 0.0f);
      }
    }
    for (; i < n; ++i) y_[i] = score(first + i);
    for (; i % L != 0; ++i) y_[i] = y_[n - 1];
    return n;
  }

  // Amounts of tokens [first, first + n) to amount_, their scores to y_; n = 0 if none of them has
  // a key of at least floor_key. Needs max() before.
  int amounts(const Measure& measure, int64_t first, uint32_t floor_key) {
    if (!may_reach(first, floor_key)) return 0;
    const int n = stage(first);
    const Kept& kept = measure.kept;
    const VecF bound = splat<VecF>(score_of_key(kept.key));
    for (int i = 0; i < n; i += kLanes<float>) {
      const VecF y = load(y_ + i);
      VecF exact = VecF{} + 1.0f;
      if (measure.mass) exact = measure.template exact_mass<VecI32>(y);
      // As Measure::filtered, which is asked where there is a tie.
      if (kept.key > 0) {
        exact = measure.ties ? VecF{} : bitcast<VecF>(bitcast<VecI32>(exact) & (y > bound));
      }
      round_to_amounts(exact, kept.min_mass, amount_ + i);
      if (kept.key > 0 && any(y == bound)) {
        for (int l = 0; l < kLanes<float>; ++l) {
          if (y_[i + l] == bound[l]) amount_[i + l] = measure.of(y_[i + l], first + i + l);
        }
      }
    }
    return n;
  }

  const T* x_;             // [V]
  const int32_t* counts_;  // [V] or null
  const Penalties& penalties_;
  int64_t V_;
  int64_t chunk_;  // tokens per sum, whole blocks
  int64_t run_;    // tokens per largest score, whole blocks
  float max_ = 0;  // largest score
  float y_[kBlock];
  uint64_t amount_[kBlock];
  uint64_t sums_[kChunks];
  float run_max_[kRuns];
};

template <class T>
void sample_row(const SampleArgs& args, int64_t b) {
  const T* x = static_cast<const T*>(args.logits) + args.logits_rows.offset(b);
  const Penalties penalties{.repetition = static_cast<float>(args.repetition_penalty.at(b)),
                            .presence = static_cast<float>(args.presence_penalty.at(b)),
                            .frequency = static_cast<float>(args.frequency_penalty.at(b))};
  Row<T> row(x, args.token_counts ? args.token_counts + b * args.V : nullptr, penalties, args.V);
  const Drawn drawn = draw_token(row, args, b);
  args.token[b] = drawn.token;
  double logprob = drawn.logprob;
  if (args.model_logprob && drawn.token >= 0) {
    Row<T> bare(x, nullptr, penalties, args.V);
    logprob = log_softmax_of(bare, args.V, drawn.token);
  }
  args.logprob[b] = static_cast<float>(logprob);
}

}  // namespace

void sample(const SampleArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t b = begin; b < end; ++b) sample_row<T>(args, b);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
