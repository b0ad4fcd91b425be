// The gradient of x of few channels: a thread sums all of them over K.
#pragma once

#include "conv_bias_act/conv_grad_x.cuh"

namespace mbm::conv {

// Shared memory: weights [R S][kChannels] of 4 channels, grad_z [patch pixels][kPitch], windows.
template <class T>
MBM_KERNEL(kThreads, 4)
conv_stem_grad_x_kernel(const ConvCudaBackward args, const Tile tile) {
  const auto& s = args.sizes;
  Tile one = tile;
  one.blocks_k = 1;
  const Origin at = origin_of(one, gpu::block());
  const GradPatch patch(s, at);
  const int area = s.R * s.S;
  float* const weights = reinterpret_cast<float*>(gpu::shared());
  float* const grads = weights + area * kChannels * kConvCudaMostChannels;
  const int floats = tile.patch_rows * tile.patch_columns * kPitch;
  Span* const spans = reinterpret_cast<Span*>(grads + floats);
  const Windows windows{spans, spans + tile.patch_rows};
  windows.store(s, patch.row, patch.column, tile.patch_rows, tile.patch_columns);
  gpu::block_barrier("windows stored");

  const int phases = s.stride_y * s.stride_x;
  const int items = Phase(s, tile, at, 0).items;  // of all phases one for each thread: cuda_plan.h
  const Phase phase(s, tile, at, gpu::thread() / items % phases);
  const int item = gpu::thread() % items;
  const bool sums_any = gpu::thread() < items * phases;
  int bases[kGradPixels];
  bases_of(s, tile, at, patch, phase, item, bases);
  float sums[kGradPixels][kConvCudaMostChannels] = {};
  for (int k0 = 0; k0 < s.K; k0 += kChannels) {
    for (int i = gpu::thread(); i < area * kChannels * kConvCudaMostChannels; i += kThreads) {
      const int c = i % kConvCudaMostChannels, k = k0 + i / kConvCudaMostChannels % kChannels;
      const int n = i / kConvCudaMostChannels / kChannels;
      weights[i] =
          c < s.C && k < s.K ? load<T>(args.weight, int64_t{k} * s.terms + c * area + n) : 0.0f;
    }
    spread_patch<T>(args, tile, at, patch, windows, k0, grads);
    gpu::block_barrier("channels stored");
    if (sums_any)
      for (int r = phase.first_r, up = 0; r < s.R; r += s.stride_y, ++up)
        for (int q = phase.first_q, back = 0; q < s.S; q += s.stride_x, ++back) {
          const float* w = weights + (r * s.S + q) * kChannels * kConvCudaMostChannels;
          const int behind = (up * tile.patch_columns + back) * kPitch;
#pragma unroll 2
          for (int k = 0; k < kChannels; ++k, w += kConvCudaMostChannels) {
            const float4 by = *reinterpret_cast<const float4*>(w);
#pragma unroll
            for (int i = 0; i < kGradPixels; ++i) {
              const float g = grads[max(bases[i] - behind, 0) + k];
              sums[i][0] = fmaf(g, by.x, sums[i][0]);
              sums[i][1] = fmaf(g, by.y, sums[i][1]);
              sums[i][2] = fmaf(g, by.z, sums[i][2]);
              sums[i][3] = fmaf(g, by.w, sums[i][3]);
            }
          }
        }
    gpu::block_barrier("channels used");
  }
  if (!sums_any) return;
  for_pixels(s, tile, phase, item, [&](int i, int row, int column) {
    const int y = at.row + row, x = at.column + column;
    if (y >= s.Y || x >= s.X) return;
#pragma unroll
    for (int c = 0; c < kConvCudaMostChannels; ++c)
      if (c < s.C)
        gpu::store(static_cast<T*>(args.grad_x.data), offset(args.grad_x, at.b, c, y, x),
                   sums[i][c]);
  });
}

}  // namespace mbm::conv
