// What threads of a launch see of themselves and pass to one another.
#include <stdexcept>
#include <string>

#include "common/gpu/emulation.h"
#include "common/gpu/emulation_state.h"

namespace mbm::emulation {
namespace {

Block& current() { return *running->block; }

Block& alive(int rank) {
  Block& block = *current().cluster->blocks.at(rank);
  if (block.running == 0)
    throw std::logic_error("peer: block " + std::to_string(block.index) + " has ended");
  if (&block != &current()) note_read(&block.lifetime);
  return block;
}

Mbarrier& find(Block& block, const void* place) {
  for (Mbarrier& found : block.mbarriers)
    if (found.place == place) return found;
  throw std::logic_error("mbarrier: used before its initialisation");
}

void end_phase(Mbarrier& m) {
  if (m.barrier.arrived < m.barrier.wanted || m.bytes != 0) return;
  m.barrier.arrived = 0;
  ++m.barrier.generation;
}

// Not memcpy: the race checker sees what it reads.
void copy(uint32_t* to, const uint32_t* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

void* token_of(const uint32_t* flag, uint32_t value) {
  return reinterpret_cast<char*>(const_cast<uint32_t*>(flag)) + value % sizeof(*flag);
}

void* token_of(Mbarrier& m, uint64_t generation) { return &m.barrier.tokens[generation & 1]; }

}  // namespace

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

void warp_barrier(const char* site) {
  if (!is_dropped(site)) wait(current().warps[running->index / 32].barrier, site, true);
}

uint32_t shuffle_xor(uint32_t word, int mask) {
  Warp& warp = current().warps[running->index / 32];
  const int lane = running->index % 32;
  warp.words[lane][0] = word;
  wait(warp.barrier, "a shuffle", false);
  const uint32_t other = warp.words[lane ^ mask][0];
  wait(warp.barrier, "a shuffle", false);
  return other;
}

void gather(const uint32_t* mine, int count, uint32_t* all) {
  if (count > kMostWords) throw std::logic_error("gather: too many words");
  Warp& warp = current().warps[running->index / 32];
  copy(warp.words[running->index % 32], mine, count);
  wait(warp.barrier, "an mma", false);
  for (int lane = 0; lane < 32; ++lane) copy(all + lane * count, warp.words[lane], count);
  wait(warp.barrier, "an mma", false);
}

char* peer(void* p, int rank) {
  const auto offset = static_cast<char*>(p) - current().shared();
  if (offset < 0 || static_cast<size_t>(offset) >= current().bytes)
    throw std::logic_error("peer: the address is not in the block's shared memory");
  return alive(rank).shared() + offset;
}

void mbarrier_init(void* place, int arrivals) {
  Mbarrier& m = current().mbarriers.emplace_back();
  m.place = place;
  m.barrier.wanted = arrivals;
}

void mbarrier_expect(void* place, int bytes) {
  Mbarrier& m = find(current(), place);
  release(token_of(m, m.barrier.generation));
  m.bytes += bytes;
  ++m.barrier.arrived;
  end_phase(m);
}

void mbarrier_wait(const char* site, void* place, int parity) {
  if (is_dropped(site)) return;
  Mbarrier& m = find(current(), place);
  const uint64_t generation = m.barrier.generation;
  if (static_cast<int>(generation & 1) == parity) await(m.barrier, generation, site);
  acquire_all(&m.barrier.tokens[parity]);
}

void store_peer_async(void* p, const void* words, int bytes, void* place, int rank) {
  if (!running->stores_async) {
    running->stores.begin();
    running->stores_async = true;
  }
  running->stores.enter();
  char* to = peer(p, rank);
  Mbarrier& m = find(alive(rank), peer(place, rank));
  copy(reinterpret_cast<uint32_t*>(to), static_cast<const uint32_t*>(words), bytes / 4);
  for (int i = 0; i < bytes; i += 8) note_write(to + i);
  release(token_of(m, m.barrier.generation));
  running->checked.enter();
  m.bytes -= bytes;
  end_phase(m);
}

void store_flag(uint32_t* flag, uint32_t value) {
  release(token_of(flag, value));
  *flag = value;
}

void wait_flag(const char* site, const uint32_t* flag, uint32_t value) {
  if (is_dropped(site)) return;
  Thread* self = running;
  if (*flag < value) {
    self->flag = flag;
    self->value = value;
    self->site = site;
    give_turn_back();
    self->flag = nullptr;
  }
  acquire_all(token_of(flag, value));
}

}  // namespace mbm::emulation
