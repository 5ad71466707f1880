// Memory that CPU kernels need while they run, kept from call to call.
//
// What malloc gives is pages of 4 KB wherever they happen to lie: packed weights that fit
// second-level cache by their size then do not by their addresses (a recurrent step reads them all),
// and large pieces go back to the system after each call, to be cleared anew in the next. So scratch
// is a few mappings of huge pages, which the process keeps. A call that finds none free, or wants
// more than is worth keeping, gets memory of its own.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "torch/check.h"

namespace seqkern {

inline constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

// Advice only: where the kernel refuses it, pages are small and nothing else changes.
inline void ask_for_huge_pages(uintptr_t begin, uintptr_t end) {
  begin = (begin + kHugePage - 1) & ~(kHugePage - 1);
  end &= ~(kHugePage - 1);
#if defined(MADV_HUGEPAGE)
  if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct ScratchMapping {
  void* data = nullptr;
  size_t size = 0;
};
struct ScratchSlot {
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  ScratchMapping memory;
};

class CpuScratch {
 public:
  explicit CpuScratch(int64_t bytes) {
    if (bytes <= 0) return;
    const size_t size = (static_cast<size_t>(bytes) + kHugePage - 1) & ~(kHugePage - 1);
    if (size <= kMostKept) slot_ = take(size);
    if (!slot_) own_ = map(size);
  }
  ~CpuScratch() {
    if (slot_) slot_->taken.clear(std::memory_order_release);
    unmap(own_);
  }
  CpuScratch(const CpuScratch&) = delete;
  CpuScratch& operator=(const CpuScratch&) = delete;

  // Null for no bytes; otherwise aligned to a page.
  void* data() const { return slot_ ? slot_->memory.data : own_.data; }

 private:
  static constexpr int kSlots = 4;  // an op holds two at a time
  static constexpr size_t kMostKept = size_t{32} << 20;
  static inline ScratchSlot slots[kSlots];

  // A free slot, one that is large enough if there is one. A thread that finds all taken does not
  // wait: after a fork nobody may be left to give them back.
  static ScratchSlot* take(size_t size) {
    ScratchSlot* small = nullptr;
    for (ScratchSlot& slot : slots) {
      if (slot.taken.test_and_set(std::memory_order_acquire)) continue;
      if (slot.memory.size >= size) {
        if (small) small->taken.clear(std::memory_order_release);
        return &slot;
      }
      if (small) {
        slot.taken.clear(std::memory_order_release);
      } else {
        small = &slot;
      }
    }
    if (small) {
      unmap(std::exchange(small->memory, {}));
      try {
        small->memory = map(size);
      } catch (...) {
        small->taken.clear(std::memory_order_release);
        throw;
      }
    }
    return small;
  }

  static ScratchMapping map(size_t size) {
    const size_t all = size + kHugePage;  // so that it holds `size` bytes from a huge page's border
    void* from = ::mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(from != MAP_FAILED, "seqkern: no memory for ", size, " bytes of scratch");
    const auto address = reinterpret_cast<uintptr_t>(from);
    const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
    const size_t before = begin - address, after = all - before - size;
    if (before) ::munmap(from, before);
    if (after) ::munmap(reinterpret_cast<void*>(begin + size), after);
    ask_for_huge_pages(begin, begin + size);
    return {reinterpret_cast<void*>(begin), size};
  }

  static void unmap(ScratchMapping memory) {
    if (memory.data) ::munmap(memory.data, memory.size);
  }

  ScratchSlot* slot_ = nullptr;
  ScratchMapping own_;
};

}  // namespace seqkern
