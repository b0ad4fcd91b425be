// Tiles of products that a warp holds in registers: 16 rows of weights by 8 columns, both read
// along the depth in chunks of 64 bytes. bfloat16, float16 and tf32 by mma, float32 by exact
// products on the same tile.
//
// Lane 4 g + q has rows g and g + 8 of the weights, and of a chunk the 16 bytes from 16 q on: that
// reads both operands by 16 bytes, and a sum over the depth does not ask for the order in which mma
// counts it.
#pragma once

#include <type_traits>

#include "common/gpu/gpu.cuh"

namespace mbm::gpu {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 8;
template <class T>
constexpr int kChunk = 64 / sizeof(T);  // elements of the depth
template <class T>
constexpr int kQuad = 16 / sizeof(T);  // of them, a lane's

MBM_DEVICE int lane_row() { return lane() / 4; }
template <class T>
MBM_DEVICE int lane_depth() {
  return lane() % 4 * kQuad<T>;
}

// Of a factor of 4 bytes.
MBM_DEVICE uint32_t word_of(float x) { return as_word(x); }
MBM_DEVICE uint32_t word_of(tf32 x) { return as_word(factor(x).value); }
template <class T>
MBM_DEVICE uint32_t word_of(T low, T high) {
  return bits_of(low) | bits_of(high) << 16;
}

// kQuad elements at(i).
template <class T, class At>
MBM_DEVICE uint4 quad_of(const At& at) {
  if constexpr (sizeof(T) == 4)
    return {word_of(at(0)), word_of(at(1)), word_of(at(2)), word_of(at(3))};
  else
    return {word_of<T>(at(0), at(1)), word_of<T>(at(2), at(3)), word_of<T>(at(4), at(5)),
            word_of<T>(at(6), at(7))};
}

// Elements k, k + 1, ... of a row of `width`, 0 past it. `by_words`: the row lies on 16 bytes and
// its width is of whole quads.
template <class T>
MBM_DEVICE uint4 load_quad(const T* row, int k, int width, bool by_words) {
  if (k >= width) return {0, 0, 0, 0};
  if (by_words) {
    const uint4 words = load_words(row + k);
    if constexpr (!std::is_same_v<T, tf32>) return words;
    return {word_of(tf32{as_float(words.x)}), word_of(tf32{as_float(words.y)}),
            word_of(tf32{as_float(words.z)}), word_of(tf32{as_float(words.w)})};
  }
  return quad_of<T>([&](int i) { return k + i < width ? row[k + i] : from_float<T>(0.0f); });
}

// A lane's part of a chunk of 16 rows of weights.
struct RowPair {
  uint4 low, high;  // of rows g and g + 8
};

// Sums over the depth of a tile.
template <class T>
struct Sums {
  static constexpr int kColumns = 1;  // of a chunk, that a lane reads

  float d[4] = {};

  MBM_DEVICE static int column(int) { return lane_row(); }
  MBM_DEVICE void add(int, const RowPair& a, const uint4& b) {
    mma<T>(d, {a.low.x, a.high.x, a.low.y, a.high.y}, {b.x, b.y});
    mma<T>(d, {a.low.z, a.high.z, a.low.w, a.high.w}, {b.z, b.w});
  }
  MBM_DEVICE void finish(float (&sums)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = d[i];
  }
};

template <>
struct Sums<float> {
  static constexpr int kColumns = kTileColumns;

  float part[2][kTileColumns] = {};  // over the lane's quarter of each chunk

  MBM_DEVICE static int column(int i) { return i; }
  MBM_DEVICE static float dot(const uint4& a, const uint4& b, float sum) {
    sum = fmaf(as_float(a.x), as_float(b.x), sum);
    sum = fmaf(as_float(a.y), as_float(b.y), sum);
    sum = fmaf(as_float(a.z), as_float(b.z), sum);
    return fmaf(as_float(a.w), as_float(b.w), sum);
  }
  MBM_DEVICE void add(int i, const RowPair& a, const uint4& b) {
    part[0][i] = dot(a.low, b, part[0][i]);
    part[1][i] = dot(a.high, b, part[1][i]);
  }
  // Adds up four lanes, each of which keeps two columns.
  MBM_DEVICE void finish(float (&sums)[4]) const {
    const bool upper = lane() & 2, odd = lane() & 1;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float kept[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = part[row][i], high = part[row][4 + i];
        kept[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, 2);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sums[2 * row + i] =
            (odd ? kept[2 + i] : kept[i]) + shuffle_xor(odd ? kept[i] : kept[2 + i], 1);
    }
  }
};

// sums[tile][columns of 8] += weights(tile) x columns, for a chunk. column(n): a lane's quad.
template <class T, int TILES, class Column>
MBM_DEVICE void add_chunk(Sums<T> (&sums)[TILES], const RowPair (&weights)[TILES],
                          const Column& column) {
#pragma unroll
  for (int i = 0; i < Sums<T>::kColumns; ++i) {
    const uint4 b = column(Sums<T>::column(i));
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) sums[tile].add(i, weights[tile], b);
  }
}

// Stores a tile as [column][row] of this pitch; pitches of 4 more than a multiple of 16 meet no
// bank twice.
template <class T>
MBM_DEVICE void store_tile(const Sums<T>& tile, float* to, int pitch) {
  float sums[4];
  tile.finish(sums);
  to += lane() % 4 * 2 * pitch + lane_row();
  to[0] = sums[0];
  to[pitch] = sums[1];
  to[8] = sums[2];
  to[pitch + 8] = sums[3];
}

// The quad of x of this lane and its kQuad - 1 neighbours, on each of them.
template <class T>
MBM_DEVICE uint4 quad_of_neighbours(float x) {
  constexpr int kLanes = kQuad<T> / 4;  // to a word
  uint32_t word;
  if constexpr (kLanes == 1) {
    word = word_of(from_float<T>(x));
  } else {
    const uint32_t mine = bits_of(from_float<T>(x)), other = shuffle_xor(mine, 1);
    word = lane() & 1 ? other | mine << 16 : mine | other << 16;
  }
  const bool odd = lane() & kLanes, upper = lane() & 2 * kLanes;
  const uint32_t beside = shuffle_xor(word, kLanes);
  const uint32_t first = odd ? beside : word, second = odd ? word : beside;
  const uint32_t third = shuffle_xor(first, 2 * kLanes), fourth = shuffle_xor(second, 2 * kLanes);
  if (upper) return {third, fourth, first, second};
  return {first, second, third, fourth};
}

}  // namespace mbm::gpu
