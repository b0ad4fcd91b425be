// The gradient before the activation, grad_z, of single pixels: gathered from the windows that
// reach them.
#pragma once

#include "conv_bias_act/conv_epilogue.cuh"

namespace mbm::conv {

struct Span {  // of windows
  int first, count;
};

MBM_DEVICE Span windows_of(int pixel, int convolved, int kernel, int stride, int before,
                           int windows) {
  if (pixel < 0 || pixel >= convolved) return {0, 0};
  const int end = pixel + before, begin = end - kernel + 1;
  const int first = begin <= 0 ? 0 : (begin + stride - 1) / stride;
  return {first, min(windows - 1, end / stride) - first + 1};
}

// The windows of each row and column of a tile, in shared memory.
struct Windows {
  Span* rows;
  Span* columns;

  // For the tile that begins at `row`, `column`. Read it behind a barrier.
  MBM_DEVICE void store(const ConvCudaSizes& s, int row, int column, int tile_rows,
                        int tile_columns) const {
    for (int i = gpu::thread(); i < tile_rows; i += kThreads)
      rows[i] = windows_of(row + i, s.conv_y, s.pool_y, s.pool_stride_y, s.pool_top, s.out_y);
    for (int i = gpu::thread(); i < tile_columns; i += kThreads)
      columns[i] =
          windows_of(column + i, s.conv_x, s.pool_x, s.pool_stride_x, s.pool_left, s.out_x);
  }
};

// Of pixel [y, x], whose windows these are; 0 outside the map.
template <class T>
MBM_DEVICE float grad_z(const ConvCudaBackward& args, int64_t b, int k, int y, int x,
                        const Span& rows, const Span& columns) {
  const auto& s = args.sizes;
  if (k >= s.K) return 0.0f;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = rows.first; i < rows.first + rows.count; ++i)
#pragma unroll 1
    for (int j = columns.first; j < columns.first + columns.count; ++j) {
      const int64_t at = saved_at(s, b, k, i, j);
      float factor = 1.0f;
      if (args.saved.places != nullptr) {
        const int code = args.saved.places[at];
        const int place = (y + s.pool_top - i * s.pool_stride_y) * s.pool_x + x + s.pool_left -
                          j * s.pool_stride_x;
        if ((code & (kSlopeBit - 1)) != place) continue;
        if (has_bit(s.activation)) factor = slope_of_code(s.activation, code);
        if (factor == 0.0f) continue;  // whatever arrives, an infinity too
      }
      if (args.saved.z != nullptr) factor = slope(s.activation, saved_z(args.saved, at));
      sum += factor * load_at<T>(args.grad_y, b, k, i, j);
    }
  return sum;
}

// The map itself, as the residual's gradient.
template <class T>
MBM_KERNEL(kThreads, 4)
conv_grad_z_kernel(const ConvCudaBackward args, const Tile tile) {
  const Origin at = origin_of(tile, gpu::block());
  Span* const spans = reinterpret_cast<Span*>(gpu::shared());
  const Windows windows{spans, spans + tile.rows};
  windows.store(args.sizes, at.row, at.column, tile.rows, tile.columns);
  gpu::block_barrier("windows stored");
  const int rows = min(tile.rows, args.sizes.conv_y - at.row);
  const int columns = min(tile.columns, args.sizes.conv_x - at.column);
  for_each(rows, columns, channels_last(args.grad_z), [&](int channel, int row, int column) {
    const int k = at.k0 + channel, y = at.row + row, x = at.column + column;
    if (k >= args.sizes.K) return;
    const float found = grad_z<T>(args, at.b, k, y, x, windows.rows[row], windows.columns[column]);
    gpu::store(static_cast<T*>(args.grad_z.data), offset(args.grad_z, at.b, k, y, x), found);
  });
}

}  // namespace mbm::conv
