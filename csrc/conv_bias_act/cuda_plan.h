// How the kernels are launched: a block's tile and its shared memory, from the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/gpu/launch.h"
#include "conv_bias_act/depthwise_grad.cuh"
#include "conv_bias_act/stem_grad.cuh"
#include "conv_bias_act/stem_grad_x.cuh"
#include "conv_bias_act/stem_mma.cuh"

namespace mbm::conv {

using gpu::ceil_div;

constexpr int64_t kBytes = 56 * 1024;  // of a block: four of them in a multiprocessor
constexpr int kStemPixelsOfBlock = 256;
constexpr int64_t kMostParts = 256;

struct Plan {
  Tile tile;
  int64_t floats = 0;  // of shared memory
  int64_t blocks = 0;
};

inline int spanned(int count, int stride, int taps) { return (count - 1) * stride + taps; }

// The tile of a map of `height` by `width` that costs least in all. describe(rows, columns): a Plan
// with all but what is set here. work(tile): instructions of a thread, of which only ratios matter.
// A tile of one pixel is always taken.
template <class Describe, class Work>
Plan best_tile(const ConvCudaSizes& s, int height, int width, const Describe& describe,
               const Work& work) {
  Plan best;
  double least = std::numeric_limits<double>::infinity();
  for (int columns = 32; columns >= 1; columns /= 2)
    for (int rows = 16; rows >= 1; rows /= 2) {
      const bool smallest = rows * columns == 1;
      if (!smallest && (columns >= 2 * width || rows >= 2 * height)) continue;
      Plan plan;
      plan.tile.rows = rows, plan.tile.columns = columns;
      plan.tile.down = static_cast<int>(ceil_div(height, rows));
      plan.tile.across = static_cast<int>(ceil_div(width, columns));
      plan.tile.blocks_k = static_cast<int>(ceil_div(s.K, kChannels));
      if (!describe(plan) && !smallest) continue;
      if (plan.floats * 4 > kBytes && !smallest) continue;
      const double cost = static_cast<double>(plan.tile.down) * plan.tile.across * work(plan.tile);
      if (cost < least) least = cost, best = plan;
    }
  return best;
}

// Convolved pixels under a tile of outputs, and the patch that they read.
inline void pool_tile(const ConvCudaSizes& s, int multiple, Tile& tile) {
  tile.mid_rows = spanned(tile.rows, s.pool_stride_y, s.pool_y);
  tile.mid_columns = static_cast<int>(
      ceil_div(spanned(tile.columns, s.pool_stride_x, s.pool_x), multiple) * multiple);
  tile.patch_rows = spanned(tile.mid_rows, s.stride_y, s.R);
  tile.patch_columns = spanned(tile.mid_columns, s.stride_x, s.S);
}

// Instructions of a thread to take kChannels channels of a tile to or from memory, `each` an
// element: lanes lie along rows unless channels are last, and past their end they idle.
inline double moved(int rows, int columns, bool last, double each) {
  const auto across = static_cast<double>(last ? columns : ceil_div(columns, 32) * 32);
  return each * rows * across * kChannels / kThreads;
}

inline int patch_pixels(const Tile& tile) { return tile.patch_rows * tile.patch_columns; }
inline int mid_pixels(const Tile& tile) { return tile.mid_rows * tile.mid_columns; }

inline Plan plan_stem(const ConvCudaSizes& s, bool last) {
  const auto describe = [&](Plan& plan) {
    pool_tile(s, 1, plan.tile);
    plan.floats = int64_t{s.terms} * kChannels + int64_t{s.C} * patch_pixels(plan.tile) +
                  int64_t{mid_pixels(plan.tile)} * (kPitch + 1);
    return mid_pixels(plan.tile) <= kStemPixelsOfBlock;
  };
  Plan plan = best_tile(s, s.out_y, s.out_x, describe, [&](const Tile& tile) {
    const double items = ceil_div(ceil_div(mid_pixels(tile), kStemPixels) * kStemGroups, kThreads);
    return items * s.terms * 75 + 20.0 * s.C * patch_pixels(tile) / kThreads +
           moved(tile.rows, tile.columns, last, 10.0 + 10.0 * s.pool_y * s.pool_x) +
           1.0 * s.terms * kChannels / kThreads * 15 + 300;
  });
  plan.blocks = s.B * plan.tile.down * plan.tile.across * plan.tile.blocks_k;
  return plan;
}

// Blocks stay: as many as run at once, of kMmaOutputs outputs each.
inline Plan plan_mma(const ConvCudaSizes& s, const gpu::Device& device) {
  Plan plan;
  plan.tile.rows = kWarps;
  plan.tile.columns = kMmaWindows;
  plan.tile.down = static_cast<int>(ceil_div(s.out_y, kWarps));
  plan.tile.across = static_cast<int>(ceil_div(s.out_x, kMmaWindows));
  plan.tile.blocks_k = static_cast<int>(ceil_div(s.K, kMmaOutputs));
  plan.floats = 2 * kMmaPatchRows * kMmaPatchColumns;
  const int64_t at_once = ceil_div(3 * device.multiprocessors, plan.tile.blocks_k);
  plan.blocks = std::min(at_once, s.B * plan.tile.down * plan.tile.across) * plan.tile.blocks_k;
  return plan;
}

inline Plan plan_depthwise(const ConvCudaSizes& s, bool last) {
  const auto describe = [&](Plan& plan) {
    pool_tile(s, kStrip, plan.tile);
    plan.floats = int64_t{patch_pixels(plan.tile) + mid_pixels(plan.tile)} * kPitch;
    return true;
  };
  Plan plan = best_tile(s, s.out_y, s.out_x, describe, [&](const Tile& tile) {
    return moved(tile.patch_rows, tile.patch_columns, last, 15.0) +
           moved(tile.rows, tile.columns, last, 10.0 + 10.0 * s.pool_y * s.pool_x) +
           0.5 * s.R * s.S * mid_pixels(tile) + 400;
  });
  plan.blocks = s.B * plan.tile.down * plan.tile.across * plan.tile.blocks_k;
  return plan;
}

// Tiles of convolved pixels.
inline Plan plan_grad_weight(const ConvCudaSizes& s) {
  const auto describe = [&](Plan& plan) {
    Tile& tile = plan.tile;
    const int pixels = tile.rows * tile.columns;
    tile.patch_rows = spanned(tile.rows, s.stride_y, s.R);
    tile.patch_columns = spanned(tile.columns, s.stride_x, s.S);
    const int64_t spans = 2 * (tile.rows + tile.columns);
    if (s.depthwise) {
      plan.floats =
          int64_t{std::max(patch_pixels(tile) + pixels, kWarps * (s.terms + 1))} * kPitch + spans;
      return true;
    }
    plan.floats = std::max(pixels * kGradPitch, kGradFloats) + int64_t{s.C} * patch_pixels(tile) +
                  pixels + spans;
    return pixels <= kStemPixelsOfBlock;
  };
  Plan plan = best_tile(s, s.conv_y, s.conv_x, describe, [&](const Tile& tile) {
    const double patch = s.depthwise ? patch_pixels(tile) : 1.0 * s.C * patch_pixels(tile) / 32;
    return 15 * patch + 40.0 * tile.rows * tile.columns + 400;
  });
  return plan;
}

inline int64_t parts_of(const ConvCudaSizes& s, const Plan& plan) {
  return std::min(kMostParts, s.B * plan.tile.down * plan.tile.across);
}

// Tiles of x.
inline Plan plan_grad_x(const ConvCudaSizes& s, bool last) {
  const auto describe = [&](Plan& plan) {
    Tile& tile = plan.tile;
    tile.patch_rows = (tile.rows + s.R - 2) / s.stride_y + 1;
    tile.patch_columns = (tile.columns + s.S - 2) / s.stride_x + 1;
    plan.floats = int64_t{patch_pixels(tile)} * kPitch + 2 * (tile.patch_rows + tile.patch_columns);
    if (s.depthwise) {
      plan.floats += int64_t{s.R * s.S + tile.rows * tile.columns} * kPitch;
      return true;
    }
    tile.blocks_k = 1;  // a block sums over K
    plan.floats += int64_t{s.R} * s.S * kChannels * kConvCudaMostChannels;
    const int64_t of_phase = ceil_div(tile.rows, s.stride_y) * ceil_div(tile.columns, s.stride_x);
    return ceil_div(of_phase, kGradPixels) * s.stride_y * s.stride_x <= kThreads;
  };
  Plan plan = best_tile(s, s.Y, s.X, describe, [&](const Tile& tile) {
    const double taps = 1.0 * s.R * s.S / (s.stride_y * s.stride_x) * tile.rows * tile.columns;
    return moved(tile.patch_rows, tile.patch_columns, last, 40.0) + taps / 2 + 400;
  });
  plan.blocks = s.B * plan.tile.down * plan.tile.across * plan.tile.blocks_k;
  return plan;
}

// Tiles of convolved pixels, of the residual's gradient.
inline Plan plan_grad_z(const ConvCudaSizes& s) {
  const auto describe = [&](Plan& plan) {
    plan.floats = 2 * (plan.tile.rows + plan.tile.columns);
    return plan.tile.rows * plan.tile.columns <= kStemPixelsOfBlock;
  };
  Plan plan = best_tile(s, s.conv_y, s.conv_x, describe,
                        [](const Tile& tile) { return 1.0 * tile.rows * tile.columns + 20; });
  plan.blocks = s.B * plan.tile.down * plan.tile.across * plan.tile.blocks_k;
  return plan;
}

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, const Plan& plan, cudaStream_t stream, const Args&... args) {
  const gpu::Launch how{plan.blocks, 1, kThreads, static_cast<size_t>(plan.floats) * sizeof(float)};
  return gpu::launch(kernel, how, stream, args...);
}

}  // namespace mbm::conv
