// How the CPU runs a recurrence, whatever the cell: rows in an order, units in blocks, threads as
// teams. The cells' own files (lstm_forward.cpp and its kin) are the pointwise parts.
//
// Rows are ordered by length, longest first, so that those still running at a step are the first
// ones: their states lie side by side in scratch and the products have no holes. The rows are dealt
// to chains. A chain is a recurrence of its own; the threads of one share its units, with a barrier
// per step (team.h). Few rows make one chain; with rows enough for a full tile in each, every
// thread gets a chain of its own and meets no barrier.
#pragma once

#include "cpu/recurrent_product.h"
#include "cpu/team.h"
#include "ops/recurrent.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace seqkern::cpu::SEQKERN_ISA {

// Hands out pieces of the workspace; with base null it only counts. Under AddressSanitizer nothing
// may touch what lies between two pieces.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const int64_t end = used + count * static_cast<int64_t>(sizeof(T));
    used = (end + 63) & ~int64_t{63};
#if defined(__SANITIZE_ADDRESS__)
    used += 64;
    if (base) __asan_poison_memory_region(base + end, static_cast<size_t>(used - end));
#endif
    return piece;
  }
};

// Whether rows that far apart spread over the sets of the caches, so that a tile can read them
// where they are.
template <class T>
SEQKERN_INLINE bool spread_over_cache(int64_t row) {
  return row * static_cast<int64_t>(sizeof(T)) % 1024 != 0;
}

// v as the next step reads it: rounded to T.
template <class T, class Acc>
SEQKERN_INLINE Vec<Acc> rounded(Vec<Acc> v) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return v;
  } else {
    T as_stored[kLanes<Acc>];
    store(as_stored, v);
    return load(as_stored);
  }
}

template <class T, class Acc>
SEQKERN_INLINE void copy_row(Acc* to, const void* from, int64_t row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from ? load1(static_cast<const T*>(from) + row * n + i) : Acc(0);
  }
}

// A row of T as it is, zeros for none: rows without steps hand their state through.
template <class T>
SEQKERN_INLINE void hand_through(void* to, const void* from, int64_t row, int64_t n) {
  T* out = static_cast<T*>(to) + row * n;
  if (from) {
    __builtin_memcpy(out, static_cast<const T*>(from) + row * n, n * sizeof(T));
  } else {
    __builtin_memset(out, 0, n * sizeof(T));
  }
}

// Rows [begin, end) of the order, worked by `members` threads.
struct ChainRows {
  int64_t begin, end;
};

struct Teams {
  int64_t B;
  int64_t members;  // threads in all
  int64_t chains;
  int64_t per_chain;  // threads of a chain, the most
  int64_t* order;     // [B] place in the order -> row of the batch
  int64_t* steps;     // [B] steps of the row at each place

  // Chains never wait for each other, but each reads all weights in each step. So a tile of rows is
  // enough for a chain while the weights stay in cache, two while they come from memory, before
  // the units stop being shared; units that fill fewer vectors than there are threads leave no
  // choice. `parts`: of products in the matrix unit, whose tiles are higher and whose weights,
  // being read faster, should be in second-level cache.
  Teams(const RecurrentInputs& r, int64_t members, int64_t unit_vectors, int64_t weight_bytes,
        int parts, Arena& arena)
      : B(r.B), members(members) {
    const bool in_unit = kMatrixUnit && parts;
    const int64_t cache_bytes = in_unit ? 512 << 10 : 8 << 20;
    const int64_t rows_of_tile = in_unit ? kTileHeight : 8;
    chains = B / (weight_bytes <= cache_bytes ? rows_of_tile : 2 * rows_of_tile);
    if (chains * unit_vectors < members) chains = (members + unit_vectors - 1) / unit_vectors;
    if (chains > members) chains = members;
    if (chains > B) chains = B;
    if (chains < 1) chains = 1;
    per_chain = (members + chains - 1) / chains;
    order = arena.take<int64_t>(B);
    steps = arena.take<int64_t>(B);
  }

  ChainRows rows(int64_t chain) const {
    const int64_t each = B / chains, more = B % chains;
    const int64_t begin = chain * each + (chain < more ? chain : more);
    return {begin, begin + each + (chain < more)};
  }
  int64_t most_rows() const { return (B + chains - 1) / chains; }

  // Fills order and steps: by length, descending, dealt to the chains in turn.
  void sort(const RecurrentInputs& r) const {
    int64_t place = 0;
    for (int64_t chain = 0; chain < chains; ++chain) {
      for (int64_t b = chain; b < B; b += chains) order[place++] = b;
    }
    if (!r.lengths) {
      for (int64_t b = 0; b < B; ++b) steps[b] = r.T;
      return;
    }
    const auto length = [&](int64_t b) { return r.lengths[b]; };
    // Shell sort of all rows, then the deal; `steps` holds the sorted rows meanwhile.
    for (int64_t b = 0; b < B; ++b) steps[b] = b;
    int64_t gap = 1;
    while (gap < B / 3) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3) {
      for (int64_t i = gap; i < B; ++i) {
        const int64_t b = steps[i];
        int64_t j = i;
        for (; j >= gap && length(steps[j - gap]) < length(b); j -= gap) steps[j] = steps[j - gap];
        steps[j] = b;
      }
    }
    place = 0;
    for (int64_t chain = 0; chain < chains; ++chain) {
      for (int64_t i = chain; i < B; i += chains) order[place++] = steps[i];
    }
    for (int64_t i = 0; i < B; ++i) steps[i] = length(order[i]);
  }

  // Calls f(chain, member of it, members of it) for all chains, a thread's own first, then those
  // that others may be left with.
  template <class F>
  void visit(int64_t member, F f) const {
    const int64_t home = member * chains / members;
    for (int64_t i = 0; i < chains; ++i) {
      const int64_t chain = (home + i) % chains;
      const int64_t first = (chain * members + chains - 1) / chains;
      const int64_t next = ((chain + 1) * members + chains - 1) / chains;
      const int64_t count = next > first ? next - first : 1;
      f(chain, (member >= first && member < next ? member - first : member % count), count);
    }
  }
};

// What comes before the first step: the blocks of some matrices packed and the rows put in place.
// The items lie so that a thread's own, which it claims first, are the blocks that it will read:
// what another has written takes long to fetch, and in the next call longer to write again.
struct Beginning {
  int64_t blocks, matrices, members;

  int64_t items() const { return matrices * blocks + members; }
  int64_t first_of(int64_t member) const { return matrices * (blocks * member / members) + member; }

  // Calls pack(matrix, block) or place(member), whichever the item is.
  template <class Pack, class Place>
  void visit(int64_t item, Pack pack, Place place) const {
    int64_t member = 0;
    while (member + 1 < members && item >= first_of(member + 1)) ++member;
    const int64_t i = item - first_of(member);
    const int64_t first = blocks * member / members, own = blocks * (member + 1) / members - first;
    if (i < matrices * own) return pack(i % matrices, first + i / matrices);
    place(member);
  }
};

// Rows of a chain that have more than s steps, for s that only grows or only falls.
struct Running {
  const int64_t* steps;  // [count], descending
  int64_t count;
  int64_t n;

  int64_t when_growing(int64_t s) {
    while (n > 0 && steps[n - 1] <= s) --n;
    return n;
  }
  int64_t when_falling(int64_t s) {
    while (n < count && steps[n] > s) ++n;
    return n;
  }
};

SEQKERN_INLINE int64_t time_of(const RecurrentInputs& r, int64_t steps, int64_t s) {
  return r.reverse ? steps - 1 - s : s;
}

// Where the token [t, b] is in a tensor [T, B, ...] or, without padding, [tokens, ...].
SEQKERN_INLINE int64_t token_offset(const RecurrentInputs& r, SequenceStrides strides, int64_t t,
                                    int64_t b) {
  return r.first_token ? (r.first_token[b] + t) * strides.b : t * strides.t + b * strides.b;
}

template <class T>
SEQKERN_INLINE void prefetch_gates(const T* row, int64_t gates, int64_t gate_stride,
                                   int64_t units) {
  for (int64_t g = 0; g < gates; ++g) {
    const char* p = reinterpret_cast<const char*>(row + g * gate_stride);
    for (int64_t i = 0; i < units * static_cast<int64_t>(sizeof(T)); i += 64) {
      __builtin_prefetch(p + i);
    }
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
