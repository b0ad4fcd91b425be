// A convolution of few channels, exact products: each thread sums 8 pixels by 8 channels over all
// taps; the tile is then pooled out of shared memory.
//
// sm_90: a tap takes 10 loads of shared memory for 64 FMA. The limit is the FMA's rate.
#pragma once

#include "conv_bias_act/conv_epilogue.cuh"

namespace mbm::conv {

constexpr int kStemPixels = 8;   // of a thread
constexpr int kStemOutputs = 8;  // channels of a thread
constexpr int kStemGroups = kChannels / kStemOutputs;

// Shared memory: weights [terms][kChannels], patch [C][patch_rows][patch_columns], mid
// [pixels][kPitch], bases [pixels].
struct StemMemory {
  float* weights;
  float* patch;
  float* mid;
  int* bases;  // where each pixel's first tap is in the patch

  MBM_DEVICE StemMemory(const ConvCudaSizes& s, const Tile& tile) {
    weights = reinterpret_cast<float*>(gpu::shared());
    patch = weights + s.terms * kChannels;
    mid = patch + s.C * tile.patch_rows * tile.patch_columns;
    bases = reinterpret_cast<int*>(mid + tile.mid_rows * tile.mid_columns * kPitch);
  }
};

template <class T>
MBM_DEVICE void load_patch(const ConvCudaSizes& s, const ConvCudaMap& x, const Tile& tile,
                           int64_t b, int row0, int column0, float* patch) {
  for_each_of(s.C, tile.patch_rows, tile.patch_columns, channels_last(x),
              [&](int c, int row, int column) {
                patch[(c * tile.patch_rows + row) * tile.patch_columns + column] =
                    padded<T>(s, x, b, c, row0 + row, column0 + column);
              });
}

// Of `pixels` convolved pixels, `columns` in a row.
MBM_DEVICE void store_bases(const ConvCudaSizes& s, const Tile& tile, int pixels, int columns,
                            int* bases) {
  for (int p = gpu::thread(); p < pixels; p += kThreads)
    bases[p] = p / columns * s.stride_y * tile.patch_columns + p % columns * s.stride_x;
}

// To N rows of sums: values of the patch by kStemOutputs numbers, which lie at a multiple of 16
// bytes.
template <int N>
MBM_DEVICE void add_products(const float* patch, const int (&at)[N], const float* factors,
                             float (&sums)[N][kStemOutputs]) {
  const float4 low = *reinterpret_cast<const float4*>(factors);
  const float4 high = *reinterpret_cast<const float4*>(factors + 4);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = patch[at[i]];
    sums[i][0] = fmaf(x, low.x, sums[i][0]);
    sums[i][1] = fmaf(x, low.y, sums[i][1]);
    sums[i][2] = fmaf(x, low.z, sums[i][2]);
    sums[i][3] = fmaf(x, low.w, sums[i][3]);
    sums[i][4] = fmaf(x, high.x, sums[i][4]);
    sums[i][5] = fmaf(x, high.y, sums[i][5]);
    sums[i][6] = fmaf(x, high.z, sums[i][6]);
    sums[i][7] = fmaf(x, high.w, sums[i][7]);
  }
}

// Sums of the pixels p, p + step, ... of the tile and the channels from `first` on.
MBM_DEVICE void sum_pixels(const ConvCudaSizes& s, const Tile& tile, const StemMemory& memory,
                           int p, int step, int first, const float* bias) {
  const int pixels = tile.mid_rows * tile.mid_columns;
  int bases[kStemPixels];
  float sums[kStemPixels][kStemOutputs];
#pragma unroll
  for (int i = 0; i < kStemPixels; ++i) {
    bases[i] = memory.bases[min(p + i * step, pixels - 1)];
#pragma unroll
    for (int j = 0; j < kStemOutputs; ++j) sums[i][j] = bias[j];
  }
  const float* weights = memory.weights + first;
  for (int c = 0; c < s.C; ++c)
    for (int r = 0; r < s.R; ++r) {
      const float* row = memory.patch + (c * tile.patch_rows + r) * tile.patch_columns;
#pragma unroll 3
      for (int q = 0; q < s.S; ++q, weights += kChannels)
        add_products(row + q, bases, weights, sums);
    }
#pragma unroll
  for (int i = 0; i < kStemPixels; ++i) {
    if (p + i * step >= pixels) break;
    float* to = memory.mid + (p + i * step) * kPitch + first;
#pragma unroll
    for (int j = 0; j < kStemOutputs; ++j) to[j] = sums[i][j];
  }
}

template <class T>
MBM_KERNEL(kThreads, 4)
conv_stem_fwd_kernel(const ConvCudaForward args, const Tile tile) {
  const auto& s = args.sizes;
  const Origin at = origin_of(tile, gpu::block());
  const StemMemory memory(s, tile);
  const int pixels = tile.mid_rows * tile.mid_columns;
  const int row0 = (at.row * s.pool_stride_y - s.pool_top) * s.stride_y - s.top;
  const int column0 = (at.column * s.pool_stride_x - s.pool_left) * s.stride_x - s.left;
  for (int i = gpu::thread(); i < s.terms * kChannels; i += kThreads) {
    const int k = at.k0 + i % kChannels;
    memory.weights[i] = k < s.K ? load<T>(args.weight, int64_t{k} * s.terms + i / kChannels) : 0.0f;
  }
  load_patch<T>(s, args.x, tile, at.b, row0, column0, memory.patch);
  store_bases(s, tile, pixels, tile.mid_columns, memory.bases);
  gpu::block_barrier("patch stored");
  const int step = (pixels + kStemPixels - 1) / kStemPixels;
  for (int item = gpu::thread(); item < step * kStemGroups; item += kThreads) {
    const int first = item % kStemGroups * kStemOutputs;
    float bias[kStemOutputs];
#pragma unroll
    for (int j = 0; j < kStemOutputs; ++j) {
      const int k = at.k0 + first + j;
      bias[j] = args.bias != nullptr && k < s.K ? load<T>(args.bias, k) : 0.0f;
    }
    sum_pixels(s, tile, memory, item / kStemGroups, step, first, bias);
  }
  gpu::block_barrier("sums stored");
  emit_tile<T>(args, tile, at, memory.mid);
}

}  // namespace mbm::conv
