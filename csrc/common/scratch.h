// Working memory for one native call. Blocks of up to kKeep bytes come from an arena that the
// calling thread keeps, since pages that malloc maps anew cost more to touch than a small GRU takes
// to run (0.25 us a page against 100 us a call). With -DMBM_GUARDED_SCRATCH, for tests, each block
// lies in pages of its own, its end against one that may not be touched. With
// -DMBM_FAILING_SCRATCH, for tests, the allocation that mbm_allocations_left counts down to throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(MBM_GUARDED_SCRATCH)
#include <sys/mman.h>
#endif

#include "common/simd.h"

#if defined(MBM_FAILING_SCRATCH)
#include <atomic>

extern "C" {
// Below 0: none fails. Found by its name.
__attribute__((visibility("default"))) inline std::atomic<int64_t> mbm_allocations_left{-1};
}
#endif

namespace mbm::MBM_ISA {

#if defined(MBM_GUARDED_SCRATCH)
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t rounded = (bytes + 63) / 64 * 64, inner = (rounded + kPage - 1) / kPage * kPage;
    mapped_ = inner + 2 * kPage;
    void* pages =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<char*>(pages);
    mprotect(pages_, kPage, PROT_NONE);
    mprotect(pages_ + kPage + inner, kPage, PROT_NONE);
    data_ = pages_ + kPage + inner - rounded;
  }
  ~Scratch() { munmap(pages_, mapped_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *pages_ = nullptr, *data_ = nullptr;
  size_t mapped_ = 0;
};
#else
struct ScratchArena {
  static constexpr size_t kKeep = size_t{16} << 20;
  char* base = nullptr;
  size_t capacity = 0, used = 0, wanted = 0;
  ~ScratchArena() { std::free(base); }
};

inline ScratchArena& scratch_arena() {
  static thread_local ScratchArena arena;
  return arena;
}

// `bytes` of uninitialised memory, 64-byte aligned, freed with the object. Objects of one thread
// are destroyed in the reverse order of their making.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
#if defined(MBM_FAILING_SCRATCH)
    if (mbm_allocations_left.load() >= 0 && mbm_allocations_left.fetch_sub(1) == 0)
      throw std::bad_alloc();
#endif
    ScratchArena& arena = scratch_arena();
    if (arena.used == 0 && arena.capacity < arena.wanted) {
      std::free(arena.base);
      arena.base = static_cast<char*>(std::aligned_alloc(64, arena.wanted));
      arena.capacity = arena.base ? arena.wanted : 0;
    }
    const size_t total = arena.used + bytes_;
    if (total <= arena.capacity) {
      data_ = arena.base + arena.used;
      arena.used = total;
      return;
    }
    if (total <= ScratchArena::kKeep && total > arena.wanted) arena.wanted = total;
    own_ = true;
    data_ = static_cast<char*>(std::aligned_alloc(64, bytes_ > 0 ? bytes_ : 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() {
    if (own_)
      std::free(data_);
    else
      scratch_arena().used -= bytes_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* data_ = nullptr;
  size_t bytes_;
  bool own_ = false;
};
#endif

}  // namespace mbm::MBM_ISA
