// How the kernels are launched: tiles, clusters and chunks, from sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/gpu/launch.h"

namespace mbm::additive {

// Largest chunk or tile first: of equal costs it makes the fewest exponentials again.
constexpr int kTiles[] = {20, 8, 4};

using gpu::ceil_div;

// by(std::integral_constant<int, tile>), for one of kTiles.
template <class By>
auto of_tile(int tile, const By& by) {
  switch (tile) {
    case 20: return by(std::integral_constant<int, 20>());
    case 8: return by(std::integral_constant<int, 8>());
    default: return by(std::integral_constant<int, 4>());
  }
}

// Queries whose sums a thread of grad_terms holds: the least padding of T.
inline int chunk_of(int64_t T) {
  int best = kTiles[0];
  for (int chunk : kTiles)
    if (ceil_div(T, chunk) * chunk < ceil_div(T, best) * best) best = chunk;
  return best;
}

struct TilePlan {
  int tile = 0;  // queries; 0 where nothing fits into shared memory
  int cluster = 1;
};

// The least time: turns of all multiprocessors, times a block's passes over its positions, times
// the instructions of a pass and feature, 5 for a pair and 15 for a row's exponential.
// positions(tile): of a pass. bytes(tile, cluster): of shared memory.
template <class Positions, class Bytes>
TilePlan plan_tiles(const gpu::Device& device, int64_t B, int64_t T, int64_t S,
                    const Positions& positions, const Bytes& bytes) {
  TilePlan best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int tile : kTiles)
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      if (bytes(tile, cluster) > device.shared) continue;
      const int64_t blocks = B * ceil_div(T, tile) * cluster;
      const int64_t pass = positions(tile);
      const int64_t cost = ceil_div(blocks, device.multiprocessors) *
                           ceil_div(ceil_div(S, cluster), pass) *
                           (5 * tile * pass + 15 * (tile + pass));
      if (cost < least) least = cost, best = {tile, cluster};
    }
  return best;
}

// Blocks of a cluster for each of B batch elements, a block's passes being over `pass` positions;
// 0 where nothing fits into shared memory.
template <class Bytes>
int plan_slices(const gpu::Device& device, int64_t B, int64_t S, int64_t pass, const Bytes& bytes) {
  int best = 0;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
    if (bytes(cluster) > device.shared) continue;
    const int64_t cost =
        ceil_div(B * cluster, device.multiprocessors) * ceil_div(ceil_div(S, cluster), pass);
    if (cost < least) least = cost, best = cluster;
  }
  return best;
}

}  // namespace mbm::additive
