// Memory of CPU ops that is kept from call to call.
//
// What malloc gives is pages of 4 KB wherever they happen to lie: packed weights that fit
// second-level cache by their size then do not by their addresses (a recurrent step reads them
// all). And large pieces, from 32 MB on whatever the program does, go back to the system when they
// are freed and are cleared page by page when they are had again, which for the saved gates of a
// layer takes as long as the layer's pointwise part. So there are a few mappings of huge pages that
// the process keeps; a call that finds none free, or wants more than is worth keeping, gets memory
// of its own.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

struct Mapping {
  void* data = nullptr;
  size_t size = 0;

  static Mapping of(size_t size) {
    const size_t all = size + kHugePage;  // so that it holds `size` bytes from a huge page's border
    void* from = ::mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (from == MAP_FAILED) {
      throw std::runtime_error(message("seqkern: no memory for ", size, " bytes"));
    }
    const auto address = reinterpret_cast<uintptr_t>(from);
    const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
    const size_t before = begin - address, after = all - before - size;
    if (before) ::munmap(from, before);
    if (after) ::munmap(reinterpret_cast<void*>(begin + size), after);
    ask_for_huge_pages(begin, begin + size);
    return {reinterpret_cast<void*>(begin), size};
  }
  void release() {
    if (data) ::munmap(data, size);
    *this = {};
  }
};

struct KeptMapping {
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  Mapping memory;
};

// What is kept: scratch, which is had and given back all the time, and activations for backward.
struct KeptScratch {
  static constexpr size_t kMost = size_t{32} << 20;  // bytes of each
  // The system may take pages back when it needs them, without asking.
  static constexpr bool kLend = false;
  static inline KeptMapping all[4];  // an op holds two at a time
};
struct KeptActivations {
  static constexpr size_t kMost = size_t{128} << 20;
  static constexpr bool kLend = true;
  static inline KeptMapping all[4];  // a layer or direction holds one from forward to backward
};

#if defined(__SANITIZE_ADDRESS__)

// Under the sanitizer, of just the size asked for and never what an earlier call had, so that it
// sees every access to what is not this call's.
template <class Kept>
class KeptMemory {
 public:
  explicit KeptMemory(int64_t bytes) {
    constexpr size_t kPage = 4096;
    if (bytes > 0 && ::posix_memalign(&data_, kPage, static_cast<size_t>(bytes)) != 0) {
      throw std::runtime_error(message("seqkern: no memory for ", bytes, " bytes"));
    }
  }
  ~KeptMemory() { ::free(data_); }
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

#else

template <class Kept>
class KeptMemory {
 public:
  explicit KeptMemory(int64_t bytes) {
    if (bytes <= 0) return;
    const size_t size = (static_cast<size_t>(bytes) + kHugePage - 1) & ~(kHugePage - 1);
    if (size <= Kept::kMost) kept_ = take(size);
    if (!kept_) own_ = Mapping::of(size);
#if defined(SEQKERN_POISON)
    std::memset(data(), 0xff, size);  // NaN in every type
#endif
  }
  ~KeptMemory() {
    own_.release();
    if (!kept_) return;
#if defined(MADV_FREE)
    if (Kept::kLend) ::madvise(kept_->memory.data, kept_->memory.size, MADV_FREE);
#endif
    kept_->taken.clear(std::memory_order_release);
  }
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  // Null for no bytes; otherwise aligned to a page.
  void* data() const { return kept_ ? kept_->memory.data : own_.data; }

 private:
  // A free mapping, one that is large enough if there is one. A thread that finds all taken does
  // not wait: after a fork nobody may be left to give them back.
  static KeptMapping* take(size_t size) {
    KeptMapping* small = nullptr;
    for (KeptMapping& kept : Kept::all) {
      if (kept.taken.test_and_set(std::memory_order_acquire)) continue;
      if (kept.memory.size >= size) {
        if (small) small->taken.clear(std::memory_order_release);
        return &kept;
      }
      if (small) {
        kept.taken.clear(std::memory_order_release);
      } else {
        small = &kept;
      }
    }
    if (small) {
      small->memory.release();
      try {
        small->memory = Mapping::of(size);
      } catch (...) {
        small->taken.clear(std::memory_order_release);
        throw;
      }
    }
    return small;
  }

  KeptMapping* kept_ = nullptr;
  Mapping own_;
};

#endif

}  // namespace seqkern
