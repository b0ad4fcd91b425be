// The stem of a network by matrix instructions: 3x3, stride 1, bfloat16 or float16, none or relu,
// pooled 2x2. A row of 3 taps is 16 of the depth: 4 columns, the last with weights of 0, by 4
// channels. Rows g and g + 8 of a product are the columns of pooling window g, and two products its
// rows: a window's 4 pixels are in one thread.
//
// A block stays: the weights of 64 outputs are in registers while it walks over tiles of 4 rows by
// 32 windows, a warp for each row. sm_90, bfloat16, 8 windows by 64 outputs: 48 HMMA among
// instructions that the static gate counts. Limits: those, and the bytes of y.
#pragma once

#include "common/gpu/warp_product.cuh"
#include "conv_bias_act/conv_epilogue.cuh"

namespace mbm::conv {

constexpr int kMmaOutputs = 64;
constexpr int kMmaColumns = 8;  // of a product
constexpr int kMmaBlocks = kMmaOutputs / kMmaColumns;
constexpr int kMmaTaps = 3;
constexpr int kMmaWindows = 32;  // in a row of a tile
constexpr int kMmaPatchRows = 2 * kWarps + kMmaTaps - 1;
constexpr int kMmaPatchColumns = 2 * kMmaWindows + 4;  // pixels of 2 words

using MmaWeights = uint32_t[kMmaBlocks][kMmaTaps][2];
using MmaSums = float[2][kMmaBlocks][4];  // [row of the window][outputs][columns of the window]

template <class T>
MBM_DEVICE void load_weights(const ConvCudaForward& args, int k0, MmaWeights& weights) {
  const auto& s = args.sizes;
  const int row = gpu::lane() / 4, quarter = gpu::lane() % 4;
  const auto at = [&](int k, int depth, int r) {
    const int column = depth / 4, c = depth % 4;
    const bool is_there = k < s.K && column < kMmaTaps && c < s.C;
    const int64_t i = ((int64_t{k} * s.C + c) * kMmaTaps + r) * kMmaTaps + column;
    return is_there ? static_cast<const T*>(args.weight)[i] : gpu::from_float<T>(0.0f);
  };
#pragma unroll
  for (int n = 0; n < kMmaBlocks; ++n)
#pragma unroll
    for (int r = 0; r < kMmaTaps; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = k0 + n * kMmaColumns + row, depth = 8 * half + 2 * quarter;
        weights[n][r][half] = gpu::word_of<T>(at(k, depth, r), at(k, depth + 1, r));
      }
}

// Pixels of 4 channels, 0 where there is none.
template <class T>
MBM_DEVICE void load_pixels(const ConvCudaForward& args, int64_t b, int row0, int column0,
                            uint32_t* patch) {
  const auto& s = args.sizes;
  const T* x = static_cast<const T*>(args.x.data) + b * args.x.b;
  for (int i = gpu::thread(); i < kMmaPatchRows * kMmaPatchColumns; i += kThreads) {
    const int row = row0 + i / kMmaPatchColumns, column = column0 + i % kMmaPatchColumns;
    const bool within = row >= 0 && row < s.Y && column >= 0 && column < s.X;
    const T* pixel = x + row * args.x.y + column * args.x.x;
    const auto at = [&](int c) {
      return within && c < s.C ? pixel[c * args.x.c] : gpu::from_float<T>(0.0f);
    };
    patch[2 * i] = gpu::word_of<T>(at(0), at(1));
    patch[2 * i + 1] = gpu::word_of<T>(at(2), at(3));
  }
}

// Of 8 windows; `from`: the words of this lane in the patch's first row.
template <class T>
MBM_DEVICE void sum_windows(const uint32_t* from, const MmaWeights& weights, MmaSums& sums) {
  const bool last_is_tap = gpu::lane() % 4 < 2;  // else the column of weights 0, x may be anything
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int r = 0; r < kMmaTaps; ++r) {
      const uint32_t* words = from + (m + r) * 2 * kMmaPatchColumns;
      const uint32_t a[4] = {words[0], words[2], last_is_tap ? words[4] : 0,
                             last_is_tap ? words[6] : 0};
#pragma unroll
      for (int n = 0; n < kMmaBlocks; ++n) gpu::mma<T>(sums[m][n], a, weights[n][r]);
    }
}

// Word i of lane l of 4 neighbours goes to word l of lane i.
MBM_DEVICE void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = gpu::lane() & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = gpu::shuffle_xor(upper ? words[i] : words[i | bit], bit);
      if (upper)
        words[i] = other;
      else
        words[i | bit] = other;
    }
  }
}

// What a thread has of 8 windows: outputs 8 n + 2 quarter and the next of window g.
template <class T, int SAVES>
MBM_DEVICE void pool_windows(const MmaSums& sums, const float (&bias)[kMmaBlocks][2], float least,
                             uint32_t (&outputs)[kMmaBlocks], uint32_t (&codes)[kMmaBlocks]) {
#pragma unroll
  for (int n = 0; n < kMmaBlocks; ++n) {
    float out[2];
    codes[n] = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float z[4] = {sums[0][n][e], sums[0][n][e + 2], sums[1][n][e], sums[1][n][e + 2]};
      float most = z[0];
      uint32_t place = 0;
#pragma unroll
      for (int i = 1; i < 4; ++i) {
        if (SAVES && (z[i] > most || z[i] != z[i])) place = static_cast<uint32_t>(i) << (8 * e);
        most = gpu::maximum(most, z[i]);
      }
      most += bias[n][e];
      if (SAVES) codes[n] |= most <= least ? place : place | uint32_t{kSlopeBit} << (8 * e);
      out[e] = gpu::maximum(most, least);
    }
    outputs[n] = gpu::word_of<T>(gpu::from_float<T>(out[0]), gpu::from_float<T>(out[1]));
  }
}

// LAST: y is channels_last, K a multiple of 8, so that a lane stores 16 bytes of it.
template <class T, int SAVES, int LAST>
MBM_DEVICE void store_windows(const ConvCudaForward& args, int64_t b, int k0, int y, int x,
                              uint32_t (&outputs)[kMmaBlocks], uint32_t (&codes)[kMmaBlocks]) {
  const auto& s = args.sizes;
  const int quarter = gpu::lane() % 4;
  uint32_t halves[2][4], both[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    halves[0][i] = outputs[i], halves[1][i] = outputs[i + 4];
    both[i] = codes[i] | codes[i + 4] << 16;
  }
  if (LAST) transpose_quad(halves[0]), transpose_quad(halves[1]);
  if (SAVES) transpose_quad(both);
  if (x >= s.out_x) return;
  T* const to = static_cast<T*>(args.y.data) + offset(args.y, b, 0, y, x);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k = k0 + half * kMmaOutputs / 2 + quarter * 8;  // after the transposition
    if (LAST) {
      if (k < s.K)
        gpu::store_words(to + k,
                         {halves[half][0], halves[half][1], halves[half][2], halves[half][3]});
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = k0 + (half * 4 + i) * kMmaColumns + 2 * quarter;
        if (first >= s.K) continue;
        gpu::store_bits(to, first * args.y.c, halves[half][i]);
        gpu::store_bits(to, (first + 1) * args.y.c, halves[half][i] >> 16);
      }
    }
    if (SAVES && k < s.K) {
      const auto pair = [&](int i) {
        const uint32_t low = half ? both[i] >> 16 : both[i] & 0xffff;
        return low | (half ? both[i + 1] & 0xffff0000 : both[i + 1] << 16);
      };
      gpu::store_pair(args.saved.places + saved_at(s, b, k, y, x), pair(0), pair(2));
    }
  }
}

template <class T, int SAVES, int LAST>
MBM_KERNEL(kThreads, 3)
conv_stem_mma_fwd_kernel(const ConvCudaForward args, const Tile tile, const int64_t tiles,
                         const int step) {
  const auto& s = args.sizes;
  uint32_t* const patch = reinterpret_cast<uint32_t*>(gpu::shared());
  const int k0 = gpu::block() % tile.blocks_k * kMmaOutputs;
  const int row = gpu::lane() / 4, quarter = gpu::lane() % 4;
  MmaWeights weights;
  load_weights<T>(args, k0, weights);
  float bias[kMmaBlocks][2];
#pragma unroll
  for (int n = 0; n < kMmaBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = k0 + n * kMmaColumns + 2 * quarter + e;
      bias[n][e] = args.bias != nullptr && k < s.K ? load<T>(args.bias, k) : 0.0f;
    }
  const float least = s.activation == Activation::kRelu ? 0.0f : -INFINITY;
  Tile one = tile;
  one.blocks_k = 1;
  for (int64_t t = gpu::block() / tile.blocks_k; t < tiles; t += step) {
    const Origin at = origin_of(one, t);
    load_pixels<T>(args, at.b, 2 * at.row - s.top, 2 * at.column - s.left, patch);
    gpu::block_barrier("pixels stored");
    const int y = at.row + gpu::warp();
    const int columns = y < s.out_y ? min(kMmaWindows, s.out_x - at.column) : 0;
    const uint32_t* from = patch + (2 * gpu::warp() * kMmaPatchColumns + 2 * row) * 2 + quarter;
#pragma unroll 1
    for (int x = 0; x < columns; x += 8) {
      MmaSums sums = {};
      uint32_t outputs[kMmaBlocks], codes[kMmaBlocks];
      sum_windows<T>(from + 4 * x, weights, sums);
      pool_windows<T, SAVES>(sums, bias, least, outputs, codes);
      store_windows<T, SAVES, LAST>(args, at.b, k0, y, at.column + x + row, outputs, codes);
    }
    gpu::block_barrier("pixels used");
  }
}

}  // namespace mbm::conv
