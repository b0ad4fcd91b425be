// The gradients of a depthwise convolution; lanes are channels. The limit is memory traffic, then
// the loads of shared memory: one for each product.
#pragma once

#include "conv_bias_act/conv_grad_x.cuh"
#include "conv_bias_act/conv_parts.cuh"
#include "conv_bias_act/depthwise.cuh"

namespace mbm::conv {

// A block sums some of the tiles; a warp has every kWarps-th pixel and all taps. Shared memory:
// patch, grad_z, [pixels][kPitch] each, in the end the warps' sums [terms + 1][kPitch]; windows.
template <class T, int TAPS>
MBM_KERNEL(kThreads, 4)
conv_depthwise_grad_weight_kernel(const ConvCudaBackward args, const Tile tile, const int parts) {
  const auto& s = args.sizes;
  constexpr int kTerms = TAPS * TAPS;
  const int k0 = gpu::block() % tile.blocks_k * kChannels;
  const int part = gpu::block() / tile.blocks_k;
  float* const patch = reinterpret_cast<float*>(gpu::shared());
  float* const grads = patch + tile.patch_rows * tile.patch_columns * kPitch;
  const int used = tile.patch_rows * tile.patch_columns + tile.rows * tile.columns;
  const int pixels = max(used, kWarps * (kTerms + 1));
  Span* const spans = reinterpret_cast<Span*>(patch + pixels * kPitch);
  const Windows windows{spans, spans + tile.rows};
  float sums[kTerms] = {}, bias = 0.0f;
  const int64_t tiles = s.B * tile.down * tile.across;
  Tile one = tile;
  one.blocks_k = 1;
  for (int64_t t = part; t < tiles; t += parts) {
    Origin at = origin_of(one, t);
    at.k0 = k0;
    const int rows = min(tile.rows, s.conv_y - at.row);
    const int columns = min(tile.columns, s.conv_x - at.column);
    windows.store(s, at.row, at.column, rows, columns);
    load_lanes<T>(s, args.x, tile, at, at.row * s.stride_y - s.top, at.column * s.stride_x - s.left,
                  patch);
    gpu::block_barrier("patch and windows stored");
    for_each(rows, columns, channels_last(args.grad_y), [&](int channel, int row, int column) {
      grads[(row * columns + column) * kPitch + channel] =
          grad_z<T>(args, at.b, k0 + channel, at.row + row, at.column + column, windows.rows[row],
                    windows.columns[column]);
    });
    gpu::block_barrier("gradients stored");
    for (int p = gpu::warp(); p < rows * columns; p += kWarps) {
      const int row = p / columns * s.stride_y, column = p % columns * s.stride_x;
      const float g = grads[p * kPitch + gpu::lane()];
      const float* from = patch + (row * tile.patch_columns + column) * kPitch + gpu::lane();
      bias += g;
#pragma unroll
      for (int r = 0; r < TAPS; ++r)
#pragma unroll
        for (int q = 0; q < TAPS; ++q)
          sums[r * TAPS + q] =
              fmaf(g, from[(r * tile.patch_columns + q) * kPitch], sums[r * TAPS + q]);
    }
    gpu::block_barrier("tile used");
  }
  float* const mine = patch + gpu::warp() * (kTerms + 1) * kPitch + gpu::lane();
#pragma unroll
  for (int n = 0; n < kTerms; ++n) mine[n * kPitch] = sums[n];
  mine[kTerms * kPitch] = bias;
  gpu::block_barrier("sums stored");
  const Part to(args, part);
  for (int i = gpu::thread(); i < kChannels * (kTerms + 1); i += kThreads) {
    const int channel = i / (kTerms + 1), n = i % (kTerms + 1);
    if (k0 + channel >= s.K) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += patch[(w * (kTerms + 1) + n) * kPitch + channel];
    to.store(k0 + channel, n, sum);
  }
}

// A lane has a channel. Shared memory: weights [R S][kPitch]; grad_z, then the sums,
// [pixels][kPitch] each; windows.
template <class T>
MBM_KERNEL(kThreads, 4)
conv_depthwise_grad_x_kernel(const ConvCudaBackward args, const Tile tile) {
  const auto& s = args.sizes;
  const Origin at = origin_of(tile, gpu::block());
  const GradPatch patch(s, at);
  const int area = s.R * s.S;
  float* const weights = reinterpret_cast<float*>(gpu::shared());
  float* const grads = weights + area * kPitch;
  float* const sums = grads + tile.patch_rows * tile.patch_columns * kPitch;
  const int pixels = area + tile.patch_rows * tile.patch_columns + tile.rows * tile.columns;
  Span* const spans = reinterpret_cast<Span*>(weights + pixels * kPitch);
  const Windows windows{spans, spans + tile.patch_rows};
  windows.store(s, patch.row, patch.column, tile.patch_rows, tile.patch_columns);
  for (int i = gpu::thread(); i < area * kChannels; i += kThreads) {
    const int k = at.k0 + i / area, n = i % area;
    weights[n * kPitch + i / area] = k < s.K ? load<T>(args.weight, int64_t{k} * area + n) : 0.0f;
  }
  gpu::block_barrier("windows stored");
  spread_patch<T>(args, tile, at, patch, windows, at.k0, grads);
  gpu::block_barrier("gradients stored");
  const int items = Phase(s, tile, at, 0).items;
  for (int i = gpu::warp(); i < items * s.stride_y * s.stride_x; i += kWarps) {
    const Phase phase(s, tile, at, i / items);
    int bases[kGradPixels];
    bases_of(s, tile, at, patch, phase, i % items, bases);
    float found[kGradPixels] = {};
    for (int r = phase.first_r, up = 0; r < s.R; r += s.stride_y, ++up)
      for (int q = phase.first_q, back = 0; q < s.S; q += s.stride_x, ++back) {
        const float w = weights[(r * s.S + q) * kPitch + gpu::lane()];
        const int behind = (up * tile.patch_columns + back) * kPitch;
#pragma unroll
        for (int j = 0; j < kGradPixels; ++j)
          found[j] = fmaf(w, grads[max(bases[j] - behind, 0) + gpu::lane()], found[j]);
      }
    for_pixels(s, tile, phase, i % items, [&](int j, int row, int column) {
      sums[(row * tile.columns + column) * kPitch + gpu::lane()] = found[j];
    });
  }
  gpu::block_barrier("sums stored");
  const int rows = min(tile.rows, s.Y - at.row), columns = min(tile.columns, s.X - at.column);
  for_each(rows, columns, channels_last(args.grad_x), [&](int channel, int row, int column) {
    const int k = at.k0 + channel;
    if (k >= s.K) return;
    gpu::store(static_cast<T*>(args.grad_x.data),
               offset(args.grad_x, at.b, k, at.row + row, at.column + column),
               sums[(row * tile.columns + column) * kPitch + channel]);
  });
}

}  // namespace mbm::conv
