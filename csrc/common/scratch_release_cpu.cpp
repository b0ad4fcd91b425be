#include "common/parallel.h"
#include "common/scratch.h"
#include "common/scratch_release.h"

namespace mbm::MBM_ISA {

void release_scratch([[maybe_unused]] int num_threads) {
#if !defined(MBM_GUARDED_SCRATCH)
  parallel_region(num_threads, [](int, int) {
    ScratchArena& arena = scratch_arena();
    if (arena.used > 0) return;
    std::free(arena.base);
    arena.base = nullptr;
    arena.capacity = 0;
  });
#endif
}

}  // namespace mbm::MBM_ISA
