// CUDA's execution model on one host thread: a fiber for each CUDA thread, clusters one after
// another, those of a cooperative launch in turns. Kernels see it through host.h.
//
// With MBM_CHECK_RACES and kernels built with -fsanitize=thread, each CUDA thread is a thread to
// ThreadSanitizer too, and nothing but the emulated barriers orders memory: neither the fibers'
// turns nor shuffles do. All threads of a launch count as concurrent, whatever block they are of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace mbm::emulation {

struct Launch {
  int64_t blocks = 0;
  int cluster = 1;
  int threads = 0;
  size_t shared = 0;  // bytes
  bool cooperative = false;
};

// Runs `kernel` once for each CUDA thread. Shared memory starts as NaN in every float.
// Throws what the kernel throws, and std::runtime_error for a barrier that not all threads reach.
void launch(const Launch& launch, const std::function<void()>& kernel);

// Of the CUDA thread that is running.
int thread();
int64_t block();
int cluster_rank();
int cluster_size();
char* shared();
void block_barrier(const char* site);
void cluster_barrier(const char* site);
void warp_barrier(const char* site);
uint32_t shuffle_xor(uint32_t word, int mask);
// Where `p`, of this block's shared memory, is in that of block `rank` of the cluster. Throws
// std::logic_error where the block has ended or `p` is no shared memory.
char* peer(void* p, int rank);
// all[32][count]: `mine` of each lane of the warp. Orders no memory.
void gather(const uint32_t* mine, int count, uint32_t* all);

// An mbarrier at `place` in shared memory. A phase ends when `arrivals` threads have arrived, which
// expect() does, and all the bytes that they expect are there.
void mbarrier_init(void* place, int arrivals);
void mbarrier_expect(void* place, int bytes);
void mbarrier_wait(const char* site, void* place, int parity);
// `bytes`, a multiple of 8, to `p` in block `rank`, counted by the mbarrier at `place` there. To
// the race checker it is ordered by barriers alone: after those that the thread has left, before a
// wait for the phase; what else the thread did is not before that wait.
void store_peer_async(void* p, const void* words, int bytes, void* place, int rank);

// A flag in global memory: what the thread knew of before it stored a value happens before what
// another does after a wait for this very value, which may have been passed by then. To the race
// checker the values of a flag are told apart as far as 3 beyond one that somebody waits for.
void store_flag(uint32_t* flag, uint32_t value);
void wait_flag(const char* site, const uint32_t* flag, uint32_t value);

// The barriers and waits named `site` do nothing from now on; "" restores them all.
void drop(const std::string& site);
// The sites reached since the process began, each with how often by one thread, in their order.
std::vector<std::pair<std::string, int64_t>> sites();

}  // namespace mbm::emulation
