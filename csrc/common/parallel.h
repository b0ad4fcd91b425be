// Threads: OpenMP through torch's own runtime, or std::thread with -DMBM_STD_THREADS (for
// ThreadSanitizer, which reports false races in libgomp). One thread opens no parallel region.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include "common/contention.h"

#if defined(MBM_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mbm {
namespace {  // one copy per kernel file: these inline into code of one ISA

// What a thread of a team throws, such as std::bad_alloc: nothing may leave an OpenMP region or a
// std::thread, so that the first of it is kept and thrown again where the team has ended.
class FirstError {
 public:
  template <class Body>
  void guard(const Body& body) noexcept {
    try {
      body();
    } catch (...) {
      if (!taken_.exchange(true)) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr error_;
};

// body(thread, team): `team` threads run it once each, 1 <= team <= num_threads; fewer than asked
// where the cores are not free (contention.h), or OpenMP has no more. Work must be cut by fixed
// chunks, never by `team`, wherever the order of a sum could change. A body that meets the others
// at a barrier must not throw, hence not allocate: they would wait for ever.
template <class Body>
inline void parallel_region(int num_threads, const Body& body) {
  const int granted = num_threads <= 1 ? 1 : granted_team(num_threads);
  if (granted <= 1) {
    body(0, 1);
    return;
  }
#if defined(MBM_STD_THREADS)
  std::vector<std::thread> threads;
  FirstError error;
  for (int t = 1; t < granted; ++t)
    threads.emplace_back([&, t] { error.guard([&] { body(t, granted); }); });
  error.guard([&] { body(0, granted); });
  for (auto& thread : threads) thread.join();
  error.rethrow();
#elif defined(_OPENMP)
  FirstError error;
  const int64_t start = monotonic_ns();
  int64_t done = start;  // when the caller was
  take_barrier_sleep();
#pragma omp parallel num_threads(granted)
  {
    const int thread = omp_get_thread_num();
    error.guard([&] { body(thread, omp_get_num_threads()); });
    if (thread == 0) done = monotonic_ns();
  }
  const int64_t end = monotonic_ns();
  note_team(granted, end - start, end - done + take_barrier_sleep());
  error.rethrow();
#else
  body(0, 1);
#endif
}

// body(begin, end) over [0, n) in pieces of `grain` indices handed out in turn: the pieces, hence
// the results, are the same for any thread count.
template <class Body>
inline void parallel_for(int num_threads, int64_t n, int64_t grain, const Body& body) {
  const int64_t pieces = (n + grain - 1) / grain;
  const int team_wanted = pieces < num_threads ? static_cast<int>(pieces) : num_threads;
  std::atomic<int64_t> next{0};
  parallel_region(team_wanted, [&](int, int) {
    for (;;) {
      const int64_t piece = next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces) return;
      const int64_t begin = piece * grain;
      body(begin, begin + grain < n ? begin + grain : n);
    }
  });
}

// A sense-counting barrier for teams of a few threads: spins for as long as a partner that runs may
// take, then sleeps in the kernel, since a partner may have lost its core to another process.
class Barrier {
 public:
  // `team` is what parallel_region passed to the body: OpenMP may grant fewer threads than asked.
  void wait(int team) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    const int64_t start = monotonic_ns();
    phase_.wait(phase, std::memory_order_acquire);
    add_barrier_sleep(monotonic_ns() - start);
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  static constexpr int kSpins = 2000;  // about 30 us
};

}  // namespace
}  // namespace mbm
