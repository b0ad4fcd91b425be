// The exchange over groups of blocks that need no cluster: each step's vectors go through global
// memory, and each block of a group has a flag there that says how far its own have come. All
// blocks of the launch run at once.
//
// A group takes its tiles of 8 rows one after another in each step, so that the vectors of one are
// on their way while it works on the others. A warp waits for the blocks that send the part of the
// depth which it multiplies, no more.
//
// Two buffers suffice: a block stores a tile's vectors of step s + 1 after a block barrier that
// follows waits for those of step s from all blocks of its group, each of which had read the
// buffer, at step s - 1, before it sent them.
#pragma once

#include "gru/resident.cuh"

namespace mbm::gru {

constexpr int kGroupUnits = gpu::kTileRows;  // of a block

// Weights' registers beside those of addresses; in float32 the sums of 3 tiles take 48, and shared
// memory of 163 KB still holds the rest for 1024 units.
template <class T, int TILES>
constexpr int kGroupRegisters = sizeof(T) == 2 ? 120
                                : TILES == 1   ? 136
                                               : 96;

template <class T, int UNITS, int VECTORS, int TILES>
using GroupShape = Shape<T, UNITS, UNITS / kGroupUnits, VECTORS, TILES, kGroupRegisters<T, TILES>>;

// Which rows of which direction a group has.
struct Group {
  int direction, index, all;  // of the groups of a direction
  int slice;                  // the block's place in it
  int tiles, longest = 0;

  MBM_DEVICE Group(const GruCudaSizes& sizes, int of_direction, int group, int blocks)
      : direction(of_direction), index(group), all(sizes.groups), slice(gpu::block() % blocks) {
    const int64_t rows = sizes.B - int64_t{index} * kRows;
    tiles = static_cast<int>((rows + all * kRows - 1) / (all * kRows));
    for (int i = 0; i < tiles; ++i) longest = max(longest, longest_row(sizes, b0(i)));
  }
  MBM_DEVICE int b0(int tile) const { return (index + tile * all) * kRows; }
};

struct Turn {
  int step, tile;
};

template <class S>
struct GroupExchange {
  using T = typename S::Element;
  static constexpr int kThreads = S::kThreads;
  static constexpr int kBytes = S::kVectors + BlockMemory<S>::kBytes;  // of shared memory
  static constexpr int64_t kTileStates = gru_cuda_tile_states(S::kWidth);
  static constexpr int64_t kFlags = gru_cuda_group_flags(S::kBlocks);
  static constexpr int kWarpDepth = S::kWarpChunks * gpu::kChunk<T>;
  static_assert(S::kUnitWarps == 1 && kWarpDepth % S::kUnits == 0);

  const Group& group;
  T* states;        // [tiles of the direction, 2, 8, width]
  uint32_t* flags;  // of the group's blocks
  BlockMemory<S> memory{gpu::shared() + S::kVectors};

  MBM_DEVICE GroupExchange(const GruCudaSizes& sizes, const GruCudaThrough& through,
                           const Group& of)
      : group(of) {
    const int64_t tiles = (sizes.B + kRows - 1) / kRows;
    states = static_cast<T*>(through.states) + of.direction * tiles * kTileStates;
    flags = through.flags + (int64_t{of.direction} * of.all + of.index) * kFlags;
  }

  // Of a turn's sums and, 1 more, of the flags that its vectors come with.
  MBM_DEVICE int number(Turn at) const { return at.step * group.tiles + at.tile; }
  MBM_DEVICE T* row(Turn at, int b) const {
    const int64_t tile = group.index + int64_t{at.tile} * group.all;
    return states + tile * kTileStates + ((at.step & 1) * kRows + b) * S::kWidth;
  }
  MBM_DEVICE T* copied(int b) const {
    return reinterpret_cast<T*>(gpu::shared() + b * S::kRowBytes);
  }
  // vector(row, k) of the turn received, for Resident.
  MBM_DEVICE auto vectors() const {
    return [this](int b, int k) { return gpu::load_words(copied(b) + k); };
  }

  // Waits for a turn's vectors and copies the warp's part of them into shared memory.
  MBM_DEVICE void receive(Turn at) const {
    const int first = gpu::warp() * kWarpDepth;
    for (int k = gpu::lane() * S::kUnits; k < kWarpDepth; k += 32 * S::kUnits)
      gpu::wait_flag("states received", flags + (first + k) / S::kUnits % S::kBlocks,
                     number(at) + 1);
    gpu::warp_barrier("states received by lanes");
    const int mine = first + gpu::lane_depth<T>();
    const T* from = row(at, gpu::lane_row()) + mine;
    T* to = copied(gpu::lane_row()) + mine;
    constexpr int kBatch = 8;  // of a lane's loads on their way
#pragma unroll
    for (int start = 0; start < S::kWarpChunks; start += kBatch) {
      uint4 words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch && start + i < S::kWarpChunks; ++i)
        words[i] = gpu::load_words_l2(from + (start + i) * gpu::kChunk<T>);
#pragma unroll
      for (int i = 0; i < kBatch && start + i < S::kWarpChunks; ++i)
        gpu::store_words(to + (start + i) * gpu::kChunk<T>, words[i]);
    }
    gpu::warp_barrier("states copied");
  }

  // x, of place k of the depth, to all blocks; kQuad lanes with consecutive k share a store.
  MBM_DEVICE void send(Turn at, int b, int k, float x) const {
    if (b >= kRows) return;  // a warp without rows
    const uint4 words = gpu::quad_of_neighbours<T>(x);
    if (k % gpu::kQuad<T> == 0) gpu::store_words(row(at, b) + k, words);
  }
  // All that the block sends of a turn is there.
  MBM_DEVICE void publish(Turn at) const {
    gpu::block_barrier("states stored");
    if (gpu::thread() == 0) gpu::store_flag(flags + group.slice, number(at) + 1);
  }
};

}  // namespace mbm::gru
