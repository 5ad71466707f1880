// Threads that work through a sequence of stages together, each stage when the one before is done.
//
// A recurrence needs a barrier per step. One parallel region for the whole sequence costs a
// hundredth of one per step, but a barrier that waits for a given number of threads hangs when the
// pool gives fewer (nested regions, a limit on threads, chunks run one after the other). So nobody
// waits for a thread: a stage is a list of items, whoever is there claims them one by one, its own
// first and then what others have not begun, and a stage is over when all its items are. One thread
// alone does everything; whoever comes late finds less to do. The only wait is for items that a
// running thread has claimed.
//
// Which thread works an item changes nothing in its result, so bits do not depend on the threads.
#pragma once

#include <sched.h>

#include "cpu/simd.h"

namespace seqkern::cpu::SEQKERN_ISA {

// A counter with a cache line to itself.
struct alignas(64) Counter {
  int64_t value;
};

// Steps 0 .. steps - 1 of one or two phases each. counters: [1 + items[0] + items[1]], zero at
// first: items finished, then for each item the step it is claimed for next.
struct Chain {
  int64_t steps;
  int64_t items[2];  // of each phase; 0: the phase does not exist
  Counter* counters;
};

SEQKERN_INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // to most processors `yield` is nothing
#endif
}

// Works on `chain` as member of `members` until all of it is done. body(step, phase, item).
template <class Body>
SEQKERN_INLINE void run_chain(const Chain& chain, int64_t member, int64_t members, Body body) {
  // Before items of others are looked at: to look takes the cache line of a claim away from the
  // thread whose item it is, which by then is usually done with it.
  constexpr int kPatience = 64;
  constexpr int kSpins = 2000;  // before the processor is offered to whoever holds the last items
  const int64_t per_step = chain.items[0] + chain.items[1];
  int64_t* done = &chain.counters[0].value;
  int64_t step = 0;
  int phase = 0;
  const auto work = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Counter* claims = chain.counters + 1 + (phase ? chain.items[0] : 0);
    for (int64_t item = begin; item < end; ++item) {
      int64_t expected = step;
      if (__atomic_load_n(&claims[item].value, __ATOMIC_RELAXED) != step ||
          !__atomic_compare_exchange_n(&claims[item].value, &expected, step + 1, false,
                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        continue;
      }
      body(step, phase, item);
      // Release: the item's results come before its count.
      __atomic_fetch_add(done, 1, __ATOMIC_ACQ_REL);
    }
  };
  for (;;) {
    // Acquire: what the stages before have written is visible to this one.
    const int64_t finished = __atomic_load_n(done, __ATOMIC_ACQUIRE);
    if (finished >= chain.steps * per_step) return;
    step = finished / per_step;
    phase = finished % per_step >= chain.items[0] ? 1 : 0;
    const int64_t items = chain.items[phase];
    const int64_t stage_end = step * per_step + chain.items[0] + (phase ? chain.items[1] : 0);
    const auto is_over = [&] { return __atomic_load_n(done, __ATOMIC_ACQUIRE) >= stage_end; };
    const int64_t begin = items * member / members, end = items * (member + 1) / members;
    work(begin, end);
    for (int spins = 0; !is_over(); ++spins) {
      relax();
      if (spins == kPatience) {
        work(end, items);
        work(0, begin);
      }
      if (spins >= kSpins) ::sched_yield();
    }
  }
}

}  // namespace seqkern::cpu::SEQKERN_ISA
