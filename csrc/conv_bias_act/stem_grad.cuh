// The gradients of a weight of few channels and of its bias: a block sums some of the tiles, as
// products of grad_z, spread into shared memory, with the patch; conv_parts.cuh adds the blocks up.
//
// sm_90: a pixel takes 7 loads of shared memory for 32 FMA. The limit is their rate.
#pragma once

#include "conv_bias_act/conv_parts.cuh"
#include "conv_bias_act/stem.cuh"

namespace mbm::conv {

constexpr int kTaps = 4;                   // of a thread, by kStemOutputs channels
constexpr int kMostTapGroups = 16;         // of a block
constexpr int kGradPitch = kChannels + 4;  // 16 bytes, for loads of 4 channels
// At least, of grad_z: in the end it holds the sums of every thread.
constexpr int kGradFloats = kThreads * (kTaps * kStemOutputs + 1);

// How a block's threads share a tile's products.
struct StemSplit {
  int chunks = 0;      // blocks that share the taps
  int tap_groups = 0;  // of kTaps, of a block
  int slices = 0;      // of the pixels

  static StemSplit of(int terms) {
    const int groups = (terms + kTaps - 1) / kTaps;
    StemSplit found;
    found.chunks = (groups + kMostTapGroups - 1) / kMostTapGroups;
    found.tap_groups = (groups + found.chunks - 1) / found.chunks;
    found.slices = kThreads / kStemGroups / found.tap_groups;
    return found;
  }
};

using StemSums = float[kTaps][kStemOutputs];

// Shared memory: grad_z [pixels][kGradPitch], in the end the sums of every thread; patch as in the
// forward; bases [pixels]; the windows.
template <class T>
MBM_KERNEL(kThreads, 4)
conv_stem_grad_weight_kernel(const ConvCudaBackward args, const Tile tile, const StemSplit split,
                             const int parts) {
  const auto& s = args.sizes;
  const int chunk = gpu::block() % split.chunks;
  const int k0 = gpu::block() / split.chunks % tile.blocks_k * kChannels;
  const int part = gpu::block() / split.chunks / tile.blocks_k;
  const int pixels = tile.rows * tile.columns;
  float* const grads = reinterpret_cast<float*>(gpu::shared());
  float* const patch = grads + max(pixels * kGradPitch, kGradFloats);
  int* const bases = reinterpret_cast<int*>(patch + s.C * tile.patch_rows * tile.patch_columns);
  Span* const spans = reinterpret_cast<Span*>(bases + pixels);
  const Windows windows{spans, spans + tile.rows};

  const int group = gpu::thread() % kStemGroups;
  const int tap_group = gpu::thread() / kStemGroups % split.tap_groups;
  const int slice = gpu::thread() / kStemGroups / split.tap_groups;
  int taps[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const int n = min((chunk * split.tap_groups + tap_group) * kTaps + i, s.terms - 1);
    const int c = n / (s.R * s.S), r = n / s.S % s.R;
    taps[i] = (c * tile.patch_rows + r) * tile.patch_columns + n % s.S;
  }
  StemSums sums = {};
  float bias = 0.0f;
  const int64_t tiles = s.B * tile.down * tile.across;
  Tile one = tile;
  one.blocks_k = 1;
  for (int64_t t = part; t < tiles; t += parts) {
    const Origin at = origin_of(one, t);
    const int rows = min(tile.rows, s.conv_y - at.row);
    const int columns = min(tile.columns, s.conv_x - at.column);
    windows.store(s, at.row, at.column, rows, columns);
    load_patch<T>(s, args.x, tile, at.b, at.row * s.stride_y - s.top,
                  at.column * s.stride_x - s.left, patch);
    store_bases(s, tile, rows * columns, columns, bases);
    gpu::block_barrier("patch and windows stored");
    for_each(rows, columns, channels_last(args.grad_y), [&](int channel, int row, int column) {
      grads[(row * columns + column) * kGradPitch + channel] =
          grad_z<T>(args, at.b, k0 + channel, at.row + row, at.column + column, windows.rows[row],
                    windows.columns[column]);
    });
    gpu::block_barrier("gradients stored");
    if (slice < split.slices)
#pragma unroll 2
      for (int p = slice; p < rows * columns; p += split.slices)
        add_products(patch + bases[p], taps, grads + p * kGradPitch + group * kStemOutputs, sums);
    if (chunk == 0)
      for (int p = gpu::warp(); p < rows * columns; p += kWarps)
        bias += grads[p * kGradPitch + gpu::lane()];
    gpu::block_barrier("tile used");
  }
  const Part to(args, part);
  const int width = split.tap_groups * kTaps;
  float* const all = grads;  // [slice][channel][tap]
  float* const biases = grads + kThreads * kTaps * kStemOutputs;
  if (slice < split.slices)
#pragma unroll
    for (int i = 0; i < kTaps; ++i)
#pragma unroll
      for (int j = 0; j < kStemOutputs; ++j)
        all[(slice * kChannels + group * kStemOutputs + j) * width + tap_group * kTaps + i] =
            sums[i][j];
  biases[gpu::thread()] = bias;
  gpu::block_barrier("sums stored");
  for (int i = gpu::thread(); i < kChannels * width; i += kThreads) {
    const int k = k0 + i / width, n = chunk * width + i % width;
    if (k >= s.K || n >= s.terms) continue;
    float sum = 0.0f;
    for (int each = 0; each < split.slices; ++each) sum += all[each * kChannels * width + i];
    to.store(k, n, sum);
  }
  if (chunk == 0 && gpu::thread() < kChannels && k0 + gpu::thread() < s.K) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += biases[w * 32 + gpu::thread()];
    to.store(k0 + gpu::thread(), s.terms, sum);
  }
}

}  // namespace mbm::conv
