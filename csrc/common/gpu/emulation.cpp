#include "common/gpu/emulation.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>

#include "common/gpu/emulation_state.h"

namespace mbm::emulation {

Thread* running = nullptr;

namespace {

struct Site {
  const char* name = nullptr;
  int64_t reached = 0;
};
constexpr int kMostSites = 256;

void* owner = nullptr;
const std::function<void()>* body = nullptr;
std::exception_ptr thrown;
std::string dropped_site;
Site reached_sites[kMostSites + 1];
std::vector<std::unique_ptr<Fiber>> fibers;  // kept: a stack is dear to make

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

// Not strcmp: the race checker sees what it reads.
bool equal(const char* a, const char* b) {
  while (*a != 0 && *a == *b) ++a, ++b;
  return *a == *b;
}

// To the race checker a stack is one thread's until the launch ends.
std::unique_ptr<Cluster> make_cluster(const Launch& launch, int64_t first) {
  auto cluster = std::make_unique<Cluster>();
  cluster->barrier.wanted = launch.cluster * launch.threads;
  size_t fiber = kChecksRaces || launch.cooperative ? first * launch.threads : 0;
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
      if (thread.ended || (thread.barrier && thread.barrier->generation == thread.generation) ||
          (thread.flag && *thread.flag < thread.value))
        continue;
      any = true;
      running = &thread;
      thread.checked.enter();
      thread.fiber->enter();
      if (thrown) return false;
    }
  return any;
}

using Clusters = std::vector<std::unique_ptr<Cluster>>;

// All of them in turns, from number `first` on.
void run_clusters(Clusters& clusters, size_t first) {
  for (bool any = true; any && !thrown;) {
    any = false;
    for (size_t i = first; i < clusters.size() && !thrown; ++i) any |= take_turns(*clusters[i]);
  }
  if (thrown) return;
  for (size_t i = first; i < clusters.size(); ++i)
    for (auto& block : clusters[i]->blocks)
      for (Thread& thread : block->threads)
        if (!thread.ended) {
          const std::string what = "thread " + std::to_string(thread.index) + " of block " +
                                   std::to_string(block->index) + " waits at the barrier \"" +
                                   thread.site + "\", which others never reach";
          thrown = std::make_exception_ptr(std::runtime_error(what));
          return;
        }
}

}  // namespace

void give_turn_back() {
  Thread* self = running;
  CheckedThread::leave(owner);
  self->fiber->leave();
}

void acquire_all(void* token) {
  acquire(token);
  if (!running->stores_async) return;
  running->stores.enter();
  acquire(token);
  running->checked.enter();
}

void await(Barrier& barrier, uint64_t generation, const char* site) {
  Thread* self = running;
  self->barrier = &barrier;
  self->generation = generation;
  self->site = site;
  give_turn_back();
  self->barrier = nullptr;
}

void wait(Barrier& barrier, const char* site, bool orders_memory) {
  const uint64_t generation = barrier.generation;
  char* token = &barrier.tokens[generation & 1];
  if (orders_memory) release(token);
  if (++barrier.arrived == barrier.wanted) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    await(barrier, generation, site);
  }
  if (orders_memory) acquire_all(token);
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

void launch(const Launch& launch, const std::function<void()>& kernel) {
  Clusters clusters;  // to the checker all of them run at once
  owner = CheckedThread::owner();
  body = &kernel;
  thrown = nullptr;
  const int64_t at_once = launch.cooperative ? launch.blocks : launch.cluster;
  for (int64_t first = 0; first < launch.blocks && !thrown; first += at_once) {
    const size_t before = clusters.size();
    for (int64_t block = first; block < first + at_once; block += launch.cluster)
      clusters.push_back(make_cluster(launch, block));
    run_clusters(clusters, before);
    if (!kChecksRaces) clusters.clear();
  }
  for (auto& cluster : clusters)
    for (auto& block : cluster->blocks)
      for (Thread& thread : block->threads) {
        if (thread.stores_async) {
          thread.stores.join(owner);
          thread.stores.end();
        }
        thread.checked.join(owner);
        thread.checked.end();
      }
  running = nullptr;
  if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
}

void drop(const std::string& site) { dropped_site = site; }

std::vector<std::pair<std::string, int64_t>> sites() {
  std::vector<std::pair<std::string, int64_t>> found;
  for (const Site* site = reached_sites; site->name != nullptr; ++site)
    found.emplace_back(site->name, site->reached);
  return found;
}

}  // namespace mbm::emulation
