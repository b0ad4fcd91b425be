// Winograd's F(4x4, 3x3) with the points 0, +-3/4, +-3/2 and infinity, in place of the usual 0,
// +-1,
// +-2: half the rounding error (shared table in the op's README).
//   y = A^T [(G w G^T) . (B^T x B)] A, per tile of 6x6 inputs and 4x4 outputs.
#pragma once

#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_micro.h"

namespace mbm::MBM_ISA {

constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kA3 = kA * kA2, kB3 = kB * kB2, kProduct = kA2 * kB2, kSum = kA2 + kB2;
// 1 / m'(p), m the polynomial of the finite points.
constexpr float kN0 = 1 / kProduct, kNa = 1 / (2 * kA2 * (kA2 - kB2)),
                kNb = 1 / (2 * kB2 * (kB2 - kA2));

// out = B^T d, six values `step` vectors apart in each.
template <int step_in, int step_out>
inline void input_1d(const vf* d, vf* out) {
  const vf d0 = d[0], d1 = d[step_in], d2 = d[2 * step_in], d3 = d[3 * step_in],
           d4 = d[4 * step_in], d5 = d[5 * step_in];
  const vf even_a = d4 - set1(kB2) * d2, odd_a = set1(kA) * (d3 - set1(kB2) * d1);
  const vf even_b = d4 - set1(kA2) * d2, odd_b = set1(kB) * (d3 - set1(kA2) * d1);
  out[0] = set1(kProduct) * d0 - set1(kSum) * d2 + d4;
  out[step_out] = even_a + odd_a;
  out[2 * step_out] = even_a - odd_a;
  out[3 * step_out] = even_b + odd_b;
  out[4 * step_out] = even_b - odd_b;
  out[5 * step_out] = set1(kProduct) * d1 - set1(kSum) * d3 + d5;
}

// out[4] = A^T m[6].
template <int step_in, int step_out>
inline void output_1d(const vf* m, vf* out) {
  const vf sum_a = m[step_in] + m[2 * step_in], sum_b = m[3 * step_in] + m[4 * step_in];
  const vf dif_a = m[step_in] - m[2 * step_in], dif_b = m[3 * step_in] - m[4 * step_in];
  out[0] = m[0] + sum_a + sum_b;
  out[step_out] = set1(kA) * dif_a + set1(kB) * dif_b;
  out[2 * step_out] = set1(kA2) * sum_a + set1(kB2) * sum_b;
  out[3 * step_out] = set1(kA3) * dif_a + set1(kB3) * dif_b + m[5 * step_in];
}

// out[6] = A g[4]: the transpose of output_1d.
template <int step_in, int step_out>
inline void grad_output_1d(const vf* g, vf* out) {
  const vf g0 = g[0], g1 = g[step_in], g2 = g[2 * step_in], g3 = g[3 * step_in];
  const vf even_a = g0 + set1(kA2) * g2, odd_a = set1(kA) * g1 + set1(kA3) * g3;
  const vf even_b = g0 + set1(kB2) * g2, odd_b = set1(kB) * g1 + set1(kB3) * g3;
  out[0] = g0;
  out[step_out] = even_a + odd_a;
  out[2 * step_out] = even_a - odd_a;
  out[3 * step_out] = even_b + odd_b;
  out[4 * step_out] = even_b - odd_b;
  out[5 * step_out] = g3;
}

// out[3] = G^T u[6].
template <int step_in, int step_out>
inline void grad_weight_1d(const vf* u, vf* out) {
  const vf sum_a = set1(kNa) * (u[step_in] + u[2 * step_in]);
  const vf sum_b = set1(kNb) * (u[3 * step_in] + u[4 * step_in]);
  const vf dif_a = set1(kNa) * (u[step_in] - u[2 * step_in]);
  const vf dif_b = set1(kNb) * (u[3 * step_in] - u[4 * step_in]);
  out[0] = set1(kN0) * u[0] + sum_a + sum_b;
  out[step_out] = set1(kA) * dif_a + set1(kB) * dif_b;
  out[2 * step_out] = set1(kA2) * sum_a + set1(kB2) * sum_b + u[5 * step_in];
}

// u[6] = G w[3].
template <int step_in, int step_out>
inline void weight_1d(const vf* w, vf* u) {
  const vf even_a = set1(kNa) * (w[0] + set1(kA2) * w[2 * step_in]);
  const vf even_b = set1(kNb) * (w[0] + set1(kB2) * w[2 * step_in]);
  const vf odd_a = set1(kNa * kA) * w[step_in], odd_b = set1(kNb * kB) * w[step_in];
  u[0] = set1(kN0) * w[0];
  u[step_out] = even_a + odd_a;
  u[2 * step_out] = even_a - odd_a;
  u[3 * step_out] = even_b + odd_b;
  u[4 * step_out] = even_b - odd_b;
  u[5 * step_out] = w[2 * step_in];
}

// Floats between the points of a packed panel [point][C][kPanel]: a vector more than they need, so
// that 36 points do not fall into one set of the cache.
inline int64_t packed_point_step(int64_t C) { return C * kPanel + kLanes; }

// Tiles of a map of `height` x `width` outputs, counted over the images of a batch.
struct Tiles {
  int64_t down, across, count;
  Tiles(int64_t images, int64_t height, int64_t width)
      : down((height + kTile - 1) / kTile),
        across((width + kTile - 1) / kTile),
        count(images * down * across) {}
  struct Place {
    int64_t b, y, x;
  };
  Place place(int64_t t) const { return {t / (down * across), t / across % down, t % across}; }
};

// Patches side by side on the points, as conv_micro takes its A: [point][block of kLanes
// channels][tile][kLanes].
struct TransformedTiles {
  int64_t tiles, channels, blocks, point_step;
  TransformedTiles(int64_t tiles, int64_t channels)
      : tiles(tiles), channels(channels), blocks((channels + kLanes - 1) / kLanes) {
    // One vector more, so that the points do not fall into one set of the cache.
    point_step = (blocks * tiles + 1) * kLanes;
  }
  int64_t floats() const { return kPoints * point_step; }
};

// 6x6 pixels as channel vectors: pixel (i, j) at data + i * row + j * column.
struct Patch {
  const float* data;
  int64_t row, column;
};

// Pixels (y0, x0) .. + 6 of image b, channels c .. c + n: in place where the map has them side by
// side, else copied to `own` [36, kLanes]; 0 outside of height x width.
inline Patch load_patch(const ConvMap<const float>& map, int64_t height, int64_t width, int64_t b,
                        int64_t c, int n, int64_t y0, int64_t x0, float* own) {
  const bool inside = y0 >= 0 && x0 >= 0 && y0 + kPatch <= height && x0 + kPatch <= width;
  const float* base = map.data + b * map.b + c * map.c + y0 * map.y + x0 * map.x;
  if (map.c == 1 && inside && n == kLanes) return {base, map.y, map.x};
  const int first = static_cast<int>(std::max<int64_t>(0, -x0));
  const int last = static_cast<int>(std::min<int64_t>(kPatch, width - x0));
  if (!inside || n < kLanes) std::memset(own, 0, sizeof(float) * kPoints * kLanes);
  for (int i = 0; i < kPatch; ++i) {
    if (y0 + i < 0 || y0 + i >= height || first >= last) continue;
    float* to = own + i * kPatch * kLanes;
    if (map.c == 1)
      for (int j = first; j < last; ++j)
        store(to + j * kLanes, load_channels(base + i * map.y + j * map.x, n));
    else  // rows of channels in, pixels out
      transpose_rows({base + i * map.y, map.c, nullptr}, 0, n, first, last - first,
                     to + first * kLanes, kLanes);
  }
  return {own, kPatch * kLanes, kLanes};
}

// V of tiles [t0, t0 + v.tiles) of a map; the patch of a tile begins at 4 ty - top, 4 tx - left.
inline void transform_inputs(const ConvMap<const float>& map, int64_t height, int64_t width,
                             int64_t top, int64_t left, const Tiles& all, int64_t t0,
                             const TransformedTiles& v, float* out) {
  alignas(64) float own[kPoints * kLanes];
  for (int64_t t = 0; t < v.tiles; ++t) {
    const Tiles::Place at = all.place(t0 + t);
    for (int64_t block = 0; block < v.blocks; ++block) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, v.channels - block * kLanes));
      const Patch patch = load_patch(map, height, width, at.b, block * kLanes, n,
                                     at.y * kTile - top, at.x * kTile - left, own);
      vf rows[kPoints];
      for (int j = 0; j < kPatch; ++j) {
        vf d[kPatch];
        for (int i = 0; i < kPatch; ++i) d[i] = load(patch.data + i * patch.row + j * patch.column);
        input_1d<1, kPatch>(d, rows + j);
      }
      float* to = out + (block * v.tiles + t) * kLanes;
      for (int i = 0; i < kPatch; ++i) {
        vf points[kPatch];
        input_1d<1, 1>(rows + i * kPatch, points);
        for (int j = 0; j < kPatch; ++j) store(to + (i * kPatch + j) * v.point_step, points[j]);
      }
    }
  }
}

}  // namespace mbm::MBM_ISA
