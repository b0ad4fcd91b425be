// The stem of a network by matrix instructions: 3x3, stride 1, bfloat16 or float16, none or relu,
// pooled 2x2. A row of 3 taps is 16 of the depth: 4 columns, the last with weights of 0, by 4
// channels. Rows g and g + 8 of a product are the columns of pooling window g, and two products its
// rows: a window's 4 pixels are in one thread.
//
// A block stays: the weights of 64 outputs are in registers while it walks over tiles of 4 rows by
// 32 windows, a warp for each row. sm_90, bfloat16, 8 windows by 64 outputs: 48 HMMA among
// instructions that the static gate counts. Limits: those, and the bytes of y.
#pragma once

#include <type_traits>

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
using MmaRows = uint32_t[kMmaTaps + 1][4];  // of the patch, as factors of the products

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

// Pixels of 4 channels, 0 where there is none, of an x of T or of bytes, whose values T holds
// exactly.
template <class T, class X>
MBM_DEVICE void load_pixels_of(const ConvCudaForward& args, int64_t b, int row0, int column0,
                               uint32_t* patch) {
  const auto& s = args.sizes;
  const X* x = static_cast<const X*>(args.x.data) + b * args.x.b;
  for (int i = gpu::thread(); i < kMmaPatchRows * kMmaPatchColumns; i += kThreads) {
    const int row = row0 + i / kMmaPatchColumns, column = column0 + i % kMmaPatchColumns;
    const bool within = row >= 0 && row < s.Y && column >= 0 && column < s.X;
    const X* pixel = x + row * args.x.y + column * args.x.x;
    const auto at = [&](int c) {
      if (!within || c >= s.C) return gpu::from_float<T>(0.0f);
      if constexpr (std::is_same_v<X, T>)
        return pixel[c * args.x.c];
      else
        return gpu::from_float<T>(static_cast<float>(pixel[c * args.x.c]));
    };
    patch[2 * i] = gpu::word_of<T>(at(0), at(1));
    patch[2 * i + 1] = gpu::word_of<T>(at(2), at(3));
  }
}

template <class T>
MBM_DEVICE void load_pixels(const ConvCudaForward& args, int64_t b, int row0, int column0,
                            uint32_t* patch) {
  if (args.sizes.x_bytes)
    load_pixels_of<T, uint8_t>(args, b, row0, column0, patch);
  else
    load_pixels_of<T, T>(args, b, row0, column0, patch);
}

// Of 8 windows: the 4 rows of pixels under them. `from`: this lane's words in the first.
MBM_DEVICE void load_rows(const uint32_t* from, MmaRows& rows) {
  const bool last_is_tap = gpu::lane() % 4 < 2;  // else the column of weights 0, x may be anything
#pragma unroll
  for (int r = 0; r < kMmaTaps + 1; ++r, from += 2 * kMmaPatchColumns) {
    rows[r][0] = from[0], rows[r][1] = from[2];
    rows[r][2] = last_is_tap ? from[4] : 0;
    rows[r][3] = last_is_tap ? from[6] : 0;
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

// The maximum of a window, and at once its code, in byte BYTE of `codes`.
template <int SAVES, int BYTE>
MBM_DEVICE float pool_window(const float (&z)[4], float bias, float least, uint32_t& codes) {
  float most = z[0];
  uint32_t place = 0;
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (SAVES && (z[i] > most || z[i] != z[i])) place = static_cast<uint32_t>(i) << (8 * BYTE);
    most = gpu::maximum(most, z[i]);
  }
  most += bias;
  if (SAVES) codes |= most <= least ? place : place | uint32_t{kSlopeBit} << (8 * BYTE);
  return gpu::maximum(most, least);
}

// Outputs 8 N + 2 quarter and the next, of 8 windows, in the halves of a word.
template <class T, int SAVES, int N>
MBM_DEVICE uint32_t pooled_pair(const MmaRows& rows, const uint32_t (&weights)[kMmaTaps][2],
                                const float (&bias)[2], float least, uint32_t& codes) {
  float sums[2][4] = {};  // [row of the window][outputs of a column, then of the other]
#pragma unroll
  for (int r = 0; r < kMmaTaps; ++r)
#pragma unroll
    for (int m = 0; m < 2; ++m) gpu::mma<T>(sums[m], rows[m + r], weights[r]);
  const float first[4] = {sums[0][0], sums[0][2], sums[1][0], sums[1][2]};
  const float second[4] = {sums[0][1], sums[0][3], sums[1][1], sums[1][3]};
  constexpr int kByte = N / 4 * 2;  // those of N and N + 4 share a word
  const float low = pool_window<SAVES, kByte>(first, bias[0], least, codes);
  const float high = pool_window<SAVES, kByte + 1>(second, bias[1], least, codes);
  return gpu::word_of<T>(gpu::from_float<T>(low), gpu::from_float<T>(high));
}

template <class T, int SAVES, int N = 0>
MBM_DEVICE void pool_windows(const MmaRows& rows, const MmaWeights& weights,
                             const float (&bias)[kMmaBlocks][2], float least,
                             uint32_t (&outputs)[kMmaBlocks], uint32_t (&codes)[4]) {
  if constexpr (N < kMmaBlocks) {
    outputs[N] = pooled_pair<T, SAVES, N>(rows, weights[N], bias[N], least, codes[N % 4]);
    pool_windows<T, SAVES, N + 1>(rows, weights, bias, least, outputs, codes);
  }
}

// `to`, `places`: of this lane's window and the block's first output. LAST: y is channels_last, so
// that a lane stores 16 bytes of it.
template <class T, int SAVES, int LAST>
MBM_DEVICE void store_window(T* to, int64_t y_c, uint8_t* places, int outputs_left,
                             const uint32_t (&outputs)[kMmaBlocks], uint32_t (&codes)[4],
                             bool is_there) {
  const int quarter = gpu::lane() % 4;
  if (SAVES) transpose_quad(codes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = outputs[half * 4 + i];
    if (LAST) transpose_quad(words);
    if (!is_there) continue;
    const int k = half * kMmaOutputs / 2 + quarter * 8;  // after the transposition
    if (SAVES && k < outputs_left) {
      const auto pair = [&](int i) {
        return half ? codes[i] >> 16 | (codes[i + 1] & 0xffff0000)
                    : (codes[i] & 0xffff) | codes[i + 1] << 16;
      };
      gpu::store_pair(places + k, pair(0), pair(2));
    }
    if (LAST) {
      if (k < outputs_left) gpu::store_words(to + k, {words[0], words[1], words[2], words[3]});
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = (half * 4 + i) * kMmaColumns + 2 * quarter;
      if (first >= outputs_left) continue;
      gpu::store_bits(to, first * y_c, words[i]);
      gpu::store_bits(to, (first + 1) * y_c, words[i] >> 16);
    }
  }
}

template <class T, int SAVES, int LAST>
MBM_KERNEL(kThreads, LAST || !SAVES ? 3 : 2)
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
    T* to = static_cast<T*>(args.y.data) + offset(args.y, at.b, k0, y, at.column + row);
    uint8_t* places = args.saved.places + saved_at(s, at.b, k0, y, at.column + row);
#pragma unroll 1
    for (int x = row; x - row < columns; x += 8) {
      MmaRows rows;
      uint32_t outputs[kMmaBlocks], codes[4] = {};
      load_rows(from, rows);
      pool_windows<T, SAVES>(rows, weights, bias, least, outputs, codes);
      store_window<T, SAVES, LAST>(to, args.y.c, places, s.K - k0, outputs, codes, x < columns);
      from += 4 * 8, to += 8 * args.y.x, places += 8 * s.K;
    }
    gpu::block_barrier("pixels used");
  }
}

}  // namespace mbm::conv
