// A depthwise convolution; lanes are channels. A thread sums strips of 4 pixels, whose row of the
// patch it loads once; the weights of its channel stay in registers.
//
// sm_90, 3x3 of stride 1: 18 loads of shared memory and 36 FMA for 4 pixels. The limit is memory
// traffic.
#pragma once

#include "conv_bias_act/conv_epilogue.cuh"

namespace mbm::conv {

constexpr int kStrip = 4;

// The patch of a block's channels, [pixels][kPitch].
template <class T>
MBM_DEVICE void load_lanes(const ConvCudaSizes& s, const ConvCudaMap& x, const Tile& tile,
                           const Origin& at, int row0, int column0, float* patch) {
  for_each(tile.patch_rows, tile.patch_columns, channels_last(x),
           [&](int channel, int row, int column) {
             patch[(row * tile.patch_columns + column) * kPitch + channel] =
                 padded<T>(s, x, at.b, at.k0 + channel, row0 + row, column0 + column);
           });
}

// Shared memory: patch, then the sums, [pixels][kPitch] each.
template <class T, int TAPS, int STRIDE>
MBM_KERNEL(kThreads, 4)
conv_depthwise_fwd_kernel(const ConvCudaForward args, const Tile tile) {
  const auto& s = args.sizes;
  const Origin at = origin_of(tile, gpu::block());
  float* const patch = reinterpret_cast<float*>(gpu::shared());
  float* const mid = patch + tile.patch_rows * tile.patch_columns * kPitch;
  load_lanes<T>(s, args.x, tile, at, (at.row * s.pool_stride_y - s.pool_top) * STRIDE - s.top,
                (at.column * s.pool_stride_x - s.pool_left) * STRIDE - s.left, patch);
  const int k = at.k0 + gpu::lane();
  float weights[TAPS * TAPS];
#pragma unroll
  for (int n = 0; n < TAPS * TAPS; ++n)
    weights[n] = k < s.K ? load<T>(args.weight, int64_t{k} * TAPS * TAPS + n) : 0.0f;
  const float bias = args.bias != nullptr && k < s.K ? load<T>(args.bias, k) : 0.0f;
  gpu::block_barrier("patch stored");
  const int across = tile.mid_columns / kStrip;
  for (int strip = gpu::warp(); strip < tile.mid_rows * across; strip += kWarps) {
    const int row = strip / across, column = strip % across * kStrip;
    const float* from = patch + (row * tile.patch_columns + column) * STRIDE * kPitch + gpu::lane();
    float sums[kStrip] = {bias, bias, bias, bias};
#pragma unroll
    for (int r = 0; r < TAPS; ++r, from += tile.patch_columns * kPitch) {
      constexpr int kWide = (kStrip - 1) * STRIDE + TAPS;
      float x[kWide];
#pragma unroll
      for (int i = 0; i < kWide; ++i) x[i] = from[i * kPitch];
#pragma unroll
      for (int q = 0; q < TAPS; ++q)
#pragma unroll
        for (int i = 0; i < kStrip; ++i)
          sums[i] = fmaf(weights[r * TAPS + q], x[i * STRIDE + q], sums[i]);
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i)
      mid[(row * tile.mid_columns + column + i) * kPitch + gpu::lane()] = sums[i];
  }
  gpu::block_barrier("sums stored");
  emit_tile<T>(args, tile, at, mid);
}

}  // namespace mbm::conv
