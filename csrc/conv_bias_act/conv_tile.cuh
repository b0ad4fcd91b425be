// What every kernel here shares: which pixels and channels a block has, and how its threads walk
// them. A block takes a tile of pixels by kChannels channels; tiles lie [pixel][kPitch] in shared
// memory, where neither neighbouring pixels nor neighbouring channels share a bank.
#pragma once

#include "common/gpu/gpu.cuh"
#include "conv_bias_act/conv_bias_act_cuda.h"

namespace mbm::conv {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kChannels = 32;
constexpr int kPitch = kChannels + 1;

// Chosen by cuda_plan.h.
struct Tile {
  int rows = 0, columns = 0;              // of a block
  int down = 0, across = 0;               // tiles of a map
  int blocks_k = 0;                       // of kChannels
  int mid_rows = 0, mid_columns = 0;      // convolved pixels, where a block pools them
  int patch_rows = 0, patch_columns = 0;  // of the map that it reads
};

struct Origin {  // of a block's tile
  int64_t b;
  int row, column, k0;
};

// Channels go fastest: blocks that read the same patch run together.
MBM_DEVICE Origin origin_of(const Tile& tile, int64_t at) {
  Origin found;
  found.k0 = static_cast<int>(at % tile.blocks_k) * kChannels;
  at /= tile.blocks_k;
  found.column = static_cast<int>(at % tile.across) * tile.columns;
  at /= tile.across;
  found.row = static_cast<int>(at % tile.down) * tile.rows;
  found.b = at / tile.down;
  return found;
}

template <class T>
MBM_DEVICE float load(const void* data, int64_t i) {
  return gpu::to_float(static_cast<const T*>(data)[i]);
}

MBM_DEVICE int64_t offset(const ConvCudaMap& map, int64_t b, int c, int y, int x) {
  return b * map.b + c * map.c + y * map.y + x * map.x;
}

template <class T>
MBM_DEVICE float load_at(const ConvCudaMap& map, int64_t b, int c, int y, int x) {
  return load<T>(map.data, offset(map, b, c, y, x));
}

// x, 0 outside it.
template <class T>
MBM_DEVICE float padded(const ConvCudaSizes& s, const ConvCudaMap& x, int64_t b, int c, int row,
                        int column) {
  const bool within = row >= 0 && row < s.Y && column >= 0 && column < s.X && c < s.C;
  if (!within) return 0.0f;
  const int64_t at = offset(x, b, c, row, column);
  return s.x_bytes ? static_cast<float>(static_cast<const uint8_t*>(x.data)[at])
                   : load<T>(x.data, at);
}

// Whether lanes lie along channels in this map.
MBM_DEVICE bool channels_last(const ConvCudaMap& map) { return map.c == 1; }

// visit(channel, row, column) for each of kChannels channels and the pixels, lanes along memory.
template <class Visit>
MBM_DEVICE void for_each(int rows, int columns, bool channels_last, const Visit& visit) {
  int channel = 0, row = gpu::warp(), column = 0;
  if (channels_last) channel = gpu::lane(), row = 0, column = gpu::warp();
#pragma unroll 1
  for (;; column += channels_last ? kWarps : 32) {
    if (channels_last) {
      for (; column >= columns; column -= columns) ++row;
      if (row >= rows) return;
    } else {
      if (column >= columns) column = 0, row += kWarps;
      for (; row >= rows; row -= rows) ++channel;
      if (channel >= kChannels) return;
    }
    const int x = channels_last ? column : column + gpu::lane();
    if (x < columns) visit(channel, row, x);
  }
}

// The same for few channels.
template <class Visit>
MBM_DEVICE void for_each_of(int channels, int rows, int columns, bool channels_last,
                            const Visit& visit) {
  if (channels_last) {
    for (int row = gpu::warp(); row < rows; row += kWarps)
      for (int i = gpu::lane(); i < columns * channels; i += 32)
        visit(i % channels, row, i / channels);
    return;
  }
  for (int line = gpu::warp(); line < channels * rows; line += kWarps)
    for (int column = gpu::lane(); column < columns; column += 32)
      visit(line / rows, line % rows, column);
}

}  // namespace mbm::conv
