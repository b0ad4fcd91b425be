// What both directions of time share: a cluster of blocks runs 8 rows through all steps. A block
// has the same units in each step; what W_hh multiplies for them stays in its registers. Each
// step's vectors go from every block to every block of the cluster by asynchronous stores, which an
// mbarrier counts.
#pragma once

#include "common/gpu/warp_product.cuh"
#include "gru/gru_cuda.h"

namespace mbm::gru {

constexpr int kRows = gpu::kTileColumns;  // of a cluster

constexpr int least(int a, int b) { return a < b ? a : b; }

// A product of TILES_OF_UNITS tiles for each 16 of a block's units, over a depth of VECTORS times
// UNITS, of which H are there.
template <class T, int UNITS, int CLUSTER, int VECTORS, int TILES_OF_UNITS>
struct Shape {
  static constexpr int kUnits = UNITS / CLUSTER;  // of a block
  static constexpr int kUnitTiles = kUnits / gpu::kTileRows;
  static constexpr int kChunks = VECTORS * UNITS / gpu::kChunk<T>;
  // Of the warps some share the units, the others the depth.
  static constexpr int kUnitWarps = kUnitTiles % 2 == 0 ? 2 : 1;
  static constexpr int kDepthWarps = least(8 / kUnitWarps, UNITS / gpu::kChunk<T>);
  static constexpr int kThreads = 32 * kUnitWarps * kDepthWarps;
  static constexpr int kWarpChunks = kChunks / kDepthWarps;
  static constexpr int kWarpUnitTiles = kUnitTiles / kUnitWarps;
  static constexpr int kWarpTiles = kWarpUnitTiles * TILES_OF_UNITS;
  // As many of a warp's chunks as leave registers for the rest; the others in shared memory.
  static constexpr int kRegisters = kWarpTiles == 6 ? 96 : 144;  // of weights; 6 tiles: their sums
  static constexpr int kRegisterChunks = least(kWarpChunks, kRegisters / (8 * kWarpTiles));
  static constexpr int kHeldQuads = (kWarpChunks - kRegisterChunks) * kWarpTiles * 2;
  static constexpr int kHeld = kHeldQuads * kThreads * 16;
  static constexpr int kOwn = (kUnits * kRows + kThreads - 1) / kThreads;  // units of a thread
  // Shared memory, in bytes: a row of states takes 64 more than a multiple of 128, so that the
  // loads of two rows at once meet no bank twice.
  static constexpr int kRowBytes = VECTORS * UNITS * sizeof(T) + 64;
  static constexpr int kStates = kRows * kRowBytes;
  static constexpr int kPitch = kUnits + 4;
  static constexpr int kTileFloats = kRows * kPitch;
  static constexpr int kPartial = kDepthWarps * TILES_OF_UNITS * kTileFloats * 4;
  static constexpr int kBytes = 2 * (kStates + kPartial) + kHeld + 2 * sizeof(gpu::Mbarrier);
  static_assert(kChunks % kDepthWarps == 0);
};

// Which rows a cluster has, and how long they are.
struct ClusterRows {
  int direction, b0, longest;

  MBM_DEVICE ClusterRows(const GruCudaSizes& sizes, int cluster) {
    const int groups = static_cast<int>((sizes.B + kRows - 1) / kRows);
    const int index = gpu::block() / cluster;
    direction = index / groups;
    b0 = index % groups * kRows;
    longest = 0;
    for (int row = 0; row < kRows; ++row) longest = max(longest, length(sizes, b0 + row));
  }
  MBM_DEVICE static int length(const GruCudaSizes& sizes, int b) {
    if (b >= sizes.B) return 0;
    const int most = static_cast<int>(sizes.T);
    if (sizes.lengths == nullptr) return most;
    const int64_t given = sizes.lengths[b];
    return given < 0 ? 0 : given < most ? static_cast<int>(given) : most;
  }
};

// A thread's share of a block's units and rows: its unit of its row, number j.
template <class S>
struct Own {
  int row, unit;  // unit: within the block
  int b, u;
  bool inside;

  MBM_DEVICE void begin(const GruCudaSizes& sizes, const ClusterRows& rows, int j) {
    const int i = gpu::thread() + j * S::kThreads;
    row = i / S::kUnits;
    unit = i % S::kUnits;
    b = rows.b0 + row;
    u = gpu::cluster_rank() * S::kUnits + unit;
    inside = row < kRows && b < sizes.B && u < sizes.H;
  }
};

// The vectors of each step, as every block of the cluster gets them: two buffers in turn.
template <class T, class S>
struct Exchange {
  char* states = gpu::shared();
  float* partial = reinterpret_cast<float*>(states + 2 * S::kStates);
  char* held = states + 2 * (S::kStates + S::kPartial);
  gpu::Mbarrier* full = reinterpret_cast<gpu::Mbarrier*>(held + S::kHeld);

  MBM_DEVICE T* row(int step, int b) const {
    return reinterpret_cast<T*>(states + (step & 1) * S::kStates + b * S::kRowBytes);
  }

  // Before a cluster barrier; of steps 1 .. last vectors are sent.
  MBM_DEVICE void begin(int last) const {
    if (gpu::thread() != 0) return;
    for (int step = 1; step <= 2; ++step) {
      gpu::mbarrier_init(full + (step & 1), 1);
      if (step <= last) expect(step);
    }
  }
  MBM_DEVICE void expect(int step) const {
    gpu::mbarrier_expect(full + (step & 1), kRows * (S::kRowBytes - 64));
  }
  MBM_DEVICE void wait(int step) const {
    gpu::mbarrier_wait("states received", full + (step & 1), (step - 1) / 2 & 1);
  }
  // After a block barrier that follows wait(step).
  MBM_DEVICE void end_reading(int step, int last) const {
    if (gpu::thread() == 0 && step > 0 && step + 2 <= last) expect(step + 2);
  }

  // x, of place k of the depth, to all blocks; kQuad lanes with consecutive k share the stores.
  MBM_DEVICE void send(int step, int b, int k, float x, int cluster) const {
    if (b >= kRows) return;  // a warp without rows
    const uint4 words = gpu::quad_of_neighbours<T>(x);
    const int mine = gpu::lane() % gpu::kQuad<T>;
    auto* to = reinterpret_cast<uint4*>(row(step, b) + k - mine);
    for (int rank = mine; rank < cluster; rank += gpu::kQuad<T>)
      gpu::store_peer_async(to, full + (step & 1), rank, words);
  }

  // Number i of the quads of weights that a thread keeps there for itself.
  MBM_DEVICE char* held_quad(int i) const { return held + (i * S::kThreads + gpu::thread()) * 16; }

  MBM_DEVICE float* partial_of(int step, int depth_warp, int tile) const {
    constexpr int kTiles = S::kPartial / (S::kDepthWarps * S::kTileFloats * 4);
    return partial + (step & 1) * (S::kPartial / 4) + (depth_warp * kTiles + tile) * S::kTileFloats;
  }
};

// Weights [3H, H] or [H, 3H], as 3H rows of H.
template <class T>
struct RowsOfWeights {
  const T* data;
  int H;
  bool by_words;

  MBM_DEVICE RowsOfWeights(const void* given, int width)
      : data(static_cast<const T*>(given)),
        H(width),
        by_words(width % gpu::kQuad<T> == 0 &&
                 reinterpret_cast<uintptr_t>(given) % sizeof(uint4) == 0) {}
  MBM_DEVICE uint4 quad(int row, int k, bool inside) const {
    return gpu::load_quad(data + int64_t{row} * H, k, inside ? H : 0, by_words);
  }
};

// A warp's part of W_hh, for all steps, and its products with a step's vectors.
template <class T, class S, int TILES_OF_UNITS>
struct Resident {
  const Exchange<T, S>& exchange;
  gpu::RowPair weights[S::kRegisterChunks][S::kWarpTiles];
  int depth_warp = gpu::warp() % S::kDepthWarps, unit_warp = gpu::warp() / S::kDepthWarps;

  MBM_DEVICE int depth(int chunk) const {
    return (depth_warp * S::kWarpChunks + chunk) * gpu::kChunk<T> + gpu::lane_depth<T>();
  }
  MBM_DEVICE int first_unit(int i) const {
    return (unit_warp * S::kWarpUnitTiles + i) * gpu::kTileRows;
  }
  MBM_DEVICE static int held(int chunk, int tile) {
    return ((chunk - S::kRegisterChunks) * S::kWarpTiles + tile) * 2;
  }

  // quad(tile of a unit, unit of the block, place in the depth): a lane's weights.
  template <class Quad>
  MBM_DEVICE Resident(const Exchange<T, S>& with, const Quad& quad) : exchange(with) {
#pragma unroll
    for (int chunk = 0; chunk < S::kWarpChunks; ++chunk)
#pragma unroll
      for (int tile = 0; tile < S::kWarpTiles; ++tile) {
        const int unit = first_unit(tile / TILES_OF_UNITS) + gpu::lane_row();
        const uint4 low = quad(tile % TILES_OF_UNITS, unit, depth(chunk));
        const uint4 high = quad(tile % TILES_OF_UNITS, unit + 8, depth(chunk));
        if (chunk < S::kRegisterChunks) {
          weights[chunk][tile] = {low, high};
        } else {
          gpu::store_words(exchange.held_quad(held(chunk, tile)), low);
          gpu::store_words(exchange.held_quad(held(chunk, tile) + 1), high);
        }
      }
  }

  // Stores the sums over this warp's part of the depth.
  MBM_DEVICE void multiply(int step) const {
    const auto states = [&](int chunk) {
      return [&, chunk](int column) {
        return gpu::load_words(exchange.row(step, column) + depth(chunk));
      };
    };
    gpu::Sums<T> sums[S::kWarpTiles];
#pragma unroll
    for (int chunk = 0; chunk < S::kRegisterChunks; ++chunk)
      gpu::add_chunk(sums, weights[chunk], states(chunk));
#pragma unroll
    for (int chunk = S::kRegisterChunks; chunk < S::kWarpChunks; ++chunk) {
      gpu::RowPair loaded[S::kWarpTiles];
#pragma unroll
      for (int tile = 0; tile < S::kWarpTiles; ++tile)
        loaded[tile] = {gpu::load_words(exchange.held_quad(held(chunk, tile))),
                        gpu::load_words(exchange.held_quad(held(chunk, tile) + 1))};
      gpu::add_chunk(sums, loaded, states(chunk));
    }
#pragma unroll
    for (int tile = 0; tile < S::kWarpTiles; ++tile)
      gpu::store_tile(sums[tile],
                      exchange.partial_of(step, depth_warp, tile % TILES_OF_UNITS) +
                          first_unit(tile / TILES_OF_UNITS),
                      S::kPitch);
  }
};

// The sum over the warps of the depth, for a thread's own unit.
template <class T, class S>
MBM_DEVICE float total(const Exchange<T, S>& exchange, int step, int tile, const Own<S>& own) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < S::kDepthWarps; ++w)
    sum += exchange.partial_of(step, w, tile)[own.row * S::kPitch + own.unit];
  return sum;
}

}  // namespace mbm::gru
