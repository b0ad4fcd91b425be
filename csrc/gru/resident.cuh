// What the kernels of a recurrence share: a group of blocks runs 8 rows of a batch at a time. A
// block has the same units in each step; what W_hh multiplies for them stays in its registers. How
// each step's vectors go from every block to every block of its group is an exchange's: that of
// cluster.cuh or of group.cuh.
#pragma once

#include "common/gpu/warp_product.cuh"
#include "gru/gru_cuda.h"

namespace mbm::gru {

constexpr int kRows = gpu::kTileColumns;  // that a group takes at a time

constexpr int least(int a, int b) { return a < b ? a : b; }

// Of weights, where a warp has the sums of so many tiles, some of one unit: as nvcc spills none.
constexpr int registers_beside(int tiles, int of_unit) {
  return tiles == 9 ? 128 : tiles == 6 ? 96 : tiles == 3 && of_unit == 1 ? 136 : 144;
}

// A product of TILES tiles for each 16 of a block's units, over a depth of VECTORS times UNITS, of
// which H are there. REGISTERS of weights a thread at most, or 0.
template <class T, int UNITS, int BLOCKS, int VECTORS, int TILES, int REGISTERS = 0>
struct Shape {
  using Element = T;
  static constexpr int kBlocks = BLOCKS;
  static constexpr int kTiles = TILES;
  static constexpr int kWidth = VECTORS * UNITS;  // of a row of vectors
  static constexpr int kUnits = UNITS / BLOCKS;   // of a block
  static constexpr int kUnitTiles = kUnits / gpu::kTileRows;
  static constexpr int kChunks = kWidth / gpu::kChunk<T>;
  // Of the warps some share the units, the others the depth.
  static constexpr int kUnitWarps = kUnitTiles % 2 == 0 ? 2 : 1;
  static constexpr int kDepthWarps = least(8 / kUnitWarps, UNITS / gpu::kChunk<T>);
  static constexpr int kThreads = 32 * kUnitWarps * kDepthWarps;
  static constexpr int kWarpChunks = kChunks / kDepthWarps;
  static constexpr int kWarpUnitTiles = kUnitTiles / kUnitWarps;
  static constexpr int kWarpTiles = kWarpUnitTiles * TILES;
  // Of a warp's tiles of weights those that leave registers for the rest; the others in shared
  // memory. Sums take registers too, in float32 4 times as many.
  static constexpr int kRegisters = REGISTERS ? REGISTERS : registers_beside(kWarpTiles, TILES);
  static constexpr int kInRegisters = least(kWarpChunks * kWarpTiles, kRegisters / 8);
  static constexpr int kHeldQuads = (kWarpChunks * kWarpTiles - kInRegisters) * 2;
  static constexpr int kHeld = kHeldQuads * kThreads * 16;                 // bytes, as kPartial
  static constexpr int kOwn = (kUnits * kRows + kThreads - 1) / kThreads;  // units of a thread
  // Of vectors in shared memory, in bytes: 64 more than a multiple of 128, so that the loads of two
  // rows at once meet no bank twice.
  static constexpr int kRowBytes = kWidth * sizeof(T) + 64;
  static constexpr int kVectors = kRows * kRowBytes;
  static constexpr int kPitch = kUnits + 4;
  static constexpr int kTileFloats = kRows * kPitch;
  static constexpr int kPartial = kDepthWarps * TILES * kTileFloats * 4;
  static_assert(kChunks % kDepthWarps == 0);
};

// Steps that row b has, 0 for one past the batch.
MBM_DEVICE int row_length(const GruCudaSizes& sizes, int b) {
  if (b >= sizes.B) return 0;
  const int most = static_cast<int>(sizes.T);
  if (sizes.lengths == nullptr) return most;
  const int64_t given = sizes.lengths[b];
  return given < 0 ? 0 : given < most ? static_cast<int>(given) : most;
}

MBM_DEVICE int longest_row(const GruCudaSizes& sizes, int b0) {
  int longest = 0;
  for (int row = 0; row < kRows; ++row) longest = max(longest, row_length(sizes, b0 + row));
  return longest;
}

// A thread's share of a block's units and of 8 rows: its unit of its row, number j.
template <class S>
struct Own {
  int row, unit;  // unit: within the block
  int b, u;
  bool inside;

  // slice: the block's place in its group.
  MBM_DEVICE void begin(const GruCudaSizes& sizes, int b0, int slice, int j) {
    const int i = gpu::thread() + j * S::kThreads;
    row = i / S::kUnits;
    unit = i % S::kUnits;
    b = b0 + row;
    u = slice * S::kUnits + unit;
    inside = row < kRows && b < sizes.B && u < sizes.H;
  }
};

// A block's shared memory but for an exchange's own: weights past the registers, and the sums of
// each warp over its part of the depth, in two buffers in turn.
template <class S>
struct BlockMemory {
  static constexpr int kBytes = 2 * S::kPartial + S::kHeld;

  float* partial;
  char* held;

  MBM_DEVICE explicit BlockMemory(char* at)
      : partial(reinterpret_cast<float*>(at)), held(at + 2 * S::kPartial) {}

  // Number i of the quads of weights that a thread keeps there for itself.
  MBM_DEVICE char* held_quad(int i) const { return held + (i * S::kThreads + gpu::thread()) * 16; }
  MBM_DEVICE float* partial_of(int number, int depth_warp, int tile) const {
    return partial + (number & 1) * (S::kPartial / 4) +
           (depth_warp * S::kTiles + tile) * S::kTileFloats;
  }
  // The sum over the warps of the depth, for a thread's own unit.
  MBM_DEVICE float total(int number, int tile, const Own<S>& own) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kDepthWarps; ++w)
      sum += partial_of(number, w, tile)[own.row * S::kPitch + own.unit];
    return sum;
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
template <class S>
struct Resident {
  using T = typename S::Element;
  const BlockMemory<S>& memory;
  gpu::RowPair weights[S::kInRegisters];
  int depth_warp = gpu::warp() % S::kDepthWarps, unit_warp = gpu::warp() / S::kDepthWarps;

  MBM_DEVICE int depth(int chunk) const {
    return (depth_warp * S::kWarpChunks + chunk) * gpu::kChunk<T> + gpu::lane_depth<T>();
  }
  MBM_DEVICE int first_unit(int i) const {
    return (unit_warp * S::kWarpUnitTiles + i) * gpu::kTileRows;
  }
  // quad(tile of a unit, unit of the block, place in the depth): a lane's weights.
  template <class Quad>
  MBM_DEVICE Resident(const BlockMemory<S>& in, const Quad& quad) : memory(in) {
#pragma unroll
    for (int chunk = 0; chunk < S::kWarpChunks; ++chunk)
#pragma unroll
      for (int tile = 0; tile < S::kWarpTiles; ++tile) {
        const int unit = first_unit(tile / S::kTiles) + gpu::lane_row();
        const uint4 low = quad(tile % S::kTiles, unit, depth(chunk));
        const uint4 high = quad(tile % S::kTiles, unit + 8, depth(chunk));
        const int i = chunk * S::kWarpTiles + tile;
        if (i < S::kInRegisters) {
          weights[i] = {low, high};
        } else {
          gpu::store_words(memory.held_quad((i - S::kInRegisters) * 2), low);
          gpu::store_words(memory.held_quad((i - S::kInRegisters) * 2 + 1), high);
        }
      }
  }
  MBM_DEVICE gpu::RowPair weight(int i) const {
    if (i < S::kInRegisters) return weights[i];
    return {gpu::load_words(memory.held_quad((i - S::kInRegisters) * 2)),
            gpu::load_words(memory.held_quad((i - S::kInRegisters) * 2 + 1))};
  }

  // Stores the sums over this warp's part of the depth. vector(row, k): a lane's quad from k on.
  template <class Vector>
  MBM_DEVICE void multiply(int number, const Vector& vector) const {
    const auto vectors = [&](int chunk) {
      return [&, chunk](int column) { return vector(column, depth(chunk)); };
    };
    gpu::Sums<T> sums[S::kWarpTiles];
#pragma unroll
    for (int chunk = 0; chunk < S::kWarpChunks; ++chunk) {
      gpu::RowPair of_chunk[S::kWarpTiles];
#pragma unroll
      for (int tile = 0; tile < S::kWarpTiles; ++tile)
        of_chunk[tile] = weight(chunk * S::kWarpTiles + tile);
      gpu::add_chunk(sums, of_chunk, vectors(chunk));
    }
#pragma unroll
    for (int tile = 0; tile < S::kWarpTiles; ++tile)
      gpu::store_tile(
          sums[tile],
          memory.partial_of(number, depth_warp, tile % S::kTiles) + first_unit(tile / S::kTiles),
          S::kPitch);
  }
};

}  // namespace mbm::gru
