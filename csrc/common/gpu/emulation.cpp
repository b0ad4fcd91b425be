#include "common/gpu/emulation.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>

#include "common/gpu/fiber.h"
#include "common/gpu/race_checker.h"

namespace mbm::emulation {
namespace {

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
  const char* site = "";
  bool ended = false;
  Fiber* fiber = nullptr;
  CheckedThread checked;
};

struct Warp {
  Barrier barrier;
  uint32_t words[32] = {};
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
  std::vector<Thread> threads;

  char* shared() { return reinterpret_cast<char*>(memory.data()); }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Site {
  const char* name = nullptr;
  int64_t reached = 0;
};
constexpr int kMostSites = 256;

Thread* running = nullptr;
void* owner = nullptr;
const std::function<void()>* body = nullptr;
std::exception_ptr thrown;
std::string dropped_site;
Site reached_sites[kMostSites + 1];
std::vector<std::unique_ptr<Fiber>> fibers;  // kept: a stack is dear to make

void give_turn_back() {
  Thread* self = running;
  CheckedThread::leave(owner);
  self->fiber->leave();
}

void run_thread(void*) {
  const bool is_first = running->index == 0;
  if (is_first) note_write(&running->block->lifetime);
  try {
    (*body)();
  } catch (...) {
    if (!thrown) thrown = std::current_exception();
  }
  if (is_first) note_write(&running->block->lifetime);
  running->ended = true;
  --running->block->running;
  give_turn_back();
}

void wait(Barrier& barrier, const char* site, bool orders_memory) {
  Thread* self = running;
  const uint64_t generation = barrier.generation;
  char* token = &barrier.tokens[generation & 1];
  if (orders_memory) release(token);
  if (++barrier.arrived == barrier.wanted) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    self->barrier = &barrier;
    self->generation = generation;
    self->site = site;
    give_turn_back();
    self->barrier = nullptr;
  }
  if (orders_memory) acquire(token);
}

// Not strcmp: the race checker sees what it reads.
bool equal(const char* a, const char* b) {
  while (*a != 0 && *a == *b) ++a, ++b;
  return *a == *b;
}

bool is_dropped(const char* site) {
  if (running->index == 0 && running->block->rank == 0) {
    Site* known = reached_sites;
    while (known->name != nullptr && !equal(known->name, site)) ++known;
    if (known == reached_sites + kMostSites) throw std::logic_error("too many barriers' names");
    known->name = site;
    ++known->reached;
  }
  return equal(dropped_site.c_str(), site);
}

// To the race checker a stack is one thread's until the launch ends.
std::unique_ptr<Cluster> make_cluster(const Launch& launch, int64_t first) {
  auto cluster = std::make_unique<Cluster>();
  cluster->barrier.wanted = launch.cluster * launch.threads;
  size_t fiber = kChecksRaces ? first * launch.threads : 0;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->index = first + rank;
    block->rank = rank;
    block->running = launch.threads;
    block->cluster = cluster.get();
    block->bytes = launch.shared;
    block->memory.resize((launch.shared + sizeof(Aligned) - 1) / sizeof(Aligned));
    std::memset(block->shared(), 0xff, launch.shared);
    block->barrier.wanted = launch.threads;
    block->warps.resize((launch.threads + 31) / 32);
    for (size_t w = 0; w < block->warps.size(); ++w)
      block->warps[w].barrier.wanted = std::min(32, launch.threads - static_cast<int>(w) * 32);
    block->threads.resize(launch.threads);
    for (int i = 0; i < launch.threads; ++i, ++fiber) {
      while (fiber >= fibers.size()) fibers.push_back(std::make_unique<Fiber>());
      Thread& thread = block->threads[i];
      thread.index = i;
      thread.block = block.get();
      thread.fiber = fibers[fiber].get();
      thread.fiber->begin(run_thread, nullptr);
      thread.checked.begin();
    }
    cluster->blocks.push_back(std::move(block));
  }
  return cluster;
}

// One turn for each thread that has something to do; false where none has.
bool take_turns(Cluster& cluster) {
  bool any = false;
  for (auto& block : cluster.blocks)
    for (Thread& thread : block->threads) {
      if (thread.ended || (thread.barrier && thread.barrier->generation == thread.generation))
        continue;
      any = true;
      running = &thread;
      thread.checked.enter();
      thread.fiber->enter();
      if (thrown) return false;
    }
  return any;
}

void run_cluster(Cluster& cluster) {
  while (take_turns(cluster)) {
  }
  if (thrown) return;
  for (auto& block : cluster.blocks)
    for (Thread& thread : block->threads)
      if (!thread.ended) {
        const std::string what = "thread " + std::to_string(thread.index) + " of block " +
                                 std::to_string(block->index) + " waits at the barrier \"" +
                                 thread.site + "\", which others never reach";
        thrown = std::make_exception_ptr(std::runtime_error(what));
        return;
      }
}

Block& current() { return *running->block; }

}  // namespace

void launch(const Launch& launch, const std::function<void()>& kernel) {
  std::vector<std::unique_ptr<Cluster>> clusters;  // to the checker all of them run at once
  owner = CheckedThread::owner();
  body = &kernel;
  thrown = nullptr;
  for (int64_t first = 0; first < launch.blocks; first += launch.cluster) {
    clusters.push_back(make_cluster(launch, first));
    run_cluster(*clusters.back());
    if (thrown) break;
    if (!kChecksRaces) clusters.clear();
  }
  for (auto& cluster : clusters)
    for (auto& block : cluster->blocks)
      for (Thread& thread : block->threads) {
        thread.checked.join(owner);
        thread.checked.end();
      }
  running = nullptr;
  if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
}

int thread() { return running->index; }

int64_t block() { return current().index; }

int cluster_rank() { return current().rank; }

int cluster_size() { return static_cast<int>(current().cluster->blocks.size()); }

char* shared() { return current().shared(); }

void block_barrier(const char* site) {
  if (!is_dropped(site)) wait(current().barrier, site, true);
}

void cluster_barrier(const char* site) {
  if (!is_dropped(site)) wait(current().cluster->barrier, site, true);
}

uint32_t shuffle_xor(uint32_t word, int mask) {
  Warp& warp = current().warps[running->index / 32];
  const int lane = running->index % 32;
  warp.words[lane] = word;
  wait(warp.barrier, "a shuffle", false);
  const uint32_t other = warp.words[lane ^ mask];
  wait(warp.barrier, "a shuffle", false);
  return other;
}

char* peer(void* p, int rank) {
  const auto offset = static_cast<char*>(p) - current().shared();
  if (offset < 0 || static_cast<size_t>(offset) >= current().bytes)
    throw std::logic_error("peer: the address is not in the block's shared memory");
  Block& other = *current().cluster->blocks.at(rank);
  if (other.running == 0)
    throw std::logic_error("peer: block " + std::to_string(other.index) + " has ended");
  if (&other != &current()) note_read(&other.lifetime);
  return other.shared() + offset;
}

void drop(const std::string& site) { dropped_site = site; }

std::vector<std::pair<std::string, int64_t>> sites() {
  std::vector<std::pair<std::string, int64_t>> found;
  for (const Site* site = reached_sites; site->name != nullptr; ++site)
    found.emplace_back(site->name, site->reached);
  return found;
}

}  // namespace mbm::emulation
