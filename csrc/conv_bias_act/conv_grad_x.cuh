// The gradient of x, for few channels and depthwise. Pixels of one phase of the stride meet the
// same taps: a thread sums kGradPixels of them at once. grad_z is spread into shared memory.
#pragma once

#include "conv_bias_act/conv_spread.cuh"

namespace mbm::conv {

constexpr int kGradPixels = 4;

// A phase of a tile of x.
struct Phase {
  int row, column;       // of the first pixel of the phase, in the tile
  int first_r, first_q;  // taps that its pixels meet, and every stride-th
  int columns;           // pixels in a row of the phase, past the tile's end at most
  int items;             // threads of the phase

  MBM_DEVICE Phase(const ConvCudaSizes& s, const Tile& tile, const Origin& at, int phase) {
    row = phase / s.stride_x, column = phase % s.stride_x;
    first_r = (at.row + row + s.top) % s.stride_y;
    first_q = (at.column + column + s.left) % s.stride_x;
    columns = (tile.columns + s.stride_x - 1) / s.stride_x;
    const int rows = (tile.rows + s.stride_y - 1) / s.stride_y;
    items = (rows * columns + kGradPixels - 1) / kGradPixels;
  }
};

// Which convolved pixels a tile of x meets.
struct GradPatch {
  int row, column;  // the first

  MBM_DEVICE GradPatch(const ConvCudaSizes& s, const Origin& at)
      : row(first(at.row + s.top, s.R, s.stride_y)),
        column(first(at.column + s.left, s.S, s.stride_x)) {}

  // The least i with i * stride + taps - 1 >= pixel.
  MBM_DEVICE static int first(int pixel, int taps, int stride) {
    const int over = pixel - taps + 1;
    return over >= 0 ? (over + stride - 1) / stride : -(-over / stride);
  }
};

template <class T>
MBM_DEVICE void spread_patch(const ConvCudaBackward& args, const Tile& tile, const Origin& at,
                             const GradPatch& patch, const Windows& windows, int k0, float* to) {
  for_each(tile.patch_rows, tile.patch_columns, channels_last(args.grad_y),
           [&](int channel, int row, int column) {
             to[(row * tile.patch_columns + column) * kPitch + channel] =
                 grad_z<T>(args, at.b, k0 + channel, patch.row + row, patch.column + column,
                           windows.rows[row], windows.columns[column]);
           });
}

// The pixels of a thread in its phase: visit(i, row, column), in the tile but not past its end.
template <class Visit>
MBM_DEVICE void for_pixels(const ConvCudaSizes& s, const Tile& tile, const Phase& phase, int item,
                           const Visit& visit) {
#pragma unroll
  for (int i = 0; i < kGradPixels; ++i) {
    const int p = item + i * phase.items;
    const int row = phase.row + p / phase.columns * s.stride_y;
    const int column = phase.column + p % phase.columns * s.stride_x;
    if (row < tile.rows && column < tile.columns) visit(i, row, column);
  }
}

// Where in the patch each pixel's first tap is; 0 for what is not in the tile.
MBM_DEVICE void bases_of(const ConvCudaSizes& s, const Tile& tile, const Origin& at,
                         const GradPatch& patch, const Phase& phase, int item,
                         int (&bases)[kGradPixels]) {
#pragma unroll
  for (int i = 0; i < kGradPixels; ++i) bases[i] = 0;
  for_pixels(s, tile, phase, item, [&](int i, int row, int column) {
    const int y = (at.row + row + s.top - phase.first_r) / s.stride_y - patch.row;
    const int x = (at.column + column + s.left - phase.first_q) / s.stride_x - patch.column;
    bases[i] = (y * tile.patch_columns + x) * kPitch;
  });
}

}  // namespace mbm::conv
