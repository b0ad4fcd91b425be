// What the emulation's parts share: the blocks of a launch and whose turn it is. Internal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "common/gpu/fiber.h"
#include "common/gpu/race_checker.h"

namespace mbm::emulation {

struct Block;

struct Barrier {
  int wanted = 0;
  int arrived = 0;
  uint64_t generation = 0;
  char tokens[2] = {};  // of two generations in turn: a thread may arrive before all have left
};

struct Thread {
  int index = 0;
  Block* block = nullptr;
  const Barrier* barrier = nullptr;  // that it waits at
  uint64_t generation = 0;           // of the barrier, as it arrived
  const uint32_t* flag = nullptr;    // that it waits for
  uint32_t value = 0;                // of the flag, at least
  const char* site = "";
  bool ended = false;
  Fiber* fiber = nullptr;
  CheckedThread checked;
  // What stores_async of the thread are to the race checker, from the first on: they follow the
  // barriers that the thread has left, and nothing that it did since is before them.
  CheckedThread stores;
  bool stores_async = false;
};

constexpr int kMostWords = 8;  // that a lane gives to its warp at once

struct Warp {
  Barrier barrier;
  uint32_t words[32][kMostWords] = {};
};

// An mbarrier of a block's shared memory; a phase is a generation.
struct Mbarrier {
  const void* place = nullptr;
  int64_t bytes = 0;  // expected and not yet there; below 0 where they came first
  Barrier barrier;
};

struct Cluster;

struct alignas(16) Aligned {  // as shared() promises
  char bytes[16];
};

struct Block {
  int64_t index = 0;
  int rank = 0;
  int running = 0;
  // Written as the block begins and ends, read by peers: an access that may come before or after
  // the block's life is a race.
  uint64_t lifetime = 0;
  Cluster* cluster = nullptr;
  std::vector<Aligned> memory;
  size_t bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::deque<Mbarrier> mbarriers;
  std::vector<Thread> threads;

  char* shared() { return reinterpret_cast<char*>(memory.data()); }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

extern Thread* running;

// Until the thread has a turn again.
void give_turn_back();
// The turn goes to others until the barrier's generation is over.
void await(Barrier& barrier, uint64_t generation, const char* site);
void wait(Barrier& barrier, const char* site, bool orders_memory);
// What `token` released happens before all that the running thread and its async stores do next.
void acquire_all(void* token);
bool is_dropped(const char* site);

}  // namespace mbm::emulation
