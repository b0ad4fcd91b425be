// A strip of input rows, padded with 0 and packed so that a register tile finds its pixels a fixed
// step apart, and the order in which a direct convolution runs through taps and channels.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_bias_act/conv_bias_act.h"
#include "conv_bias_act/conv_micro.h"

namespace mbm::MBM_ISA {

// Up to here the channels of a pixel lie side by side, unpadded.
constexpr int64_t kFewChannels = 4;

// The input pixels of a strip along one side, for a run of outputs: as they lie in the padded
// picture, or, where most of those would meet no tap, the taps of each output by themselves. So no
// stride, dilation or padding makes a strip larger than its outputs and taps do.
struct StripSide {
  static constexpr int64_t kMostIdle = 4;  // pixels of the picture for each that meets a tap
  int64_t size;                            // pixels
  int64_t step, tap;                       // pixels between neighbouring outputs, and taps
  int64_t taps, stride, dilation;
  bool dense;

  StripSide(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation)
      : taps(taps), stride(stride), dilation(dilation) {
    size = (outputs - 1) * stride + (taps - 1) * dilation + 1;
    dense = size <= kMostIdle * outputs * taps;
    if (!dense) size = outputs * taps;
    step = dense ? stride : taps;
    tap = dense ? dilation : 1;
  }

  // Where pixel i lies in the padded picture, from the first output's first tap on.
  int64_t place(int64_t i) const { return dense ? i : i / taps * stride + i % taps * dilation; }
};

struct StripPlan {
  int64_t channels;               // C / groups
  int64_t pitch;                  // floats of a pixel
  int64_t blocks;                 // of channels
  int64_t tiles_across;           // register tiles in a row of the output
  StripSide rows, columns;        // padded input pixels of the strip
  int64_t row, block;             // floats between rows, and between blocks of channels
  int64_t step, down;             // floats between neighbouring outputs of a row, of a column
  int64_t tap_step, tap_down;     // floats between neighbouring taps of a row, of a column
  std::vector<Segment> segments;  // in the order of the packed weight: r, s, channel

  // For `height` rows of the convolution's output.
  StripPlan(const ConvSizes& s, int64_t height)
      : channels(s.C / s.groups),
        pitch(few() ? channels : kLanes),
        blocks(few() ? 1 : (channels + kLanes - 1) / kLanes),
        tiles_across((halves(s) + 1) / 2),
        rows(height, s.stride_y, s.R, s.dilation_y),
        // Few channels are computed in pairs of columns.
        columns(std::max(halves(s) * kHalf, (s.conv_x + 1) / 2 * 2), s.stride_x, s.S, s.dilation_x),
        row(columns.size * pitch),
        block(rows.size * row),
        step(columns.step * pitch),
        down(rows.step * row),
        tap_step(columns.tap * pitch),
        tap_down(rows.tap * row) {
    for (int64_t r = 0; r < s.R; ++r) {
      if (few() && columns.tap == 1) {
        segments.push_back({r * tap_down, s.S * channels});
        continue;
      }
      for (int64_t t = 0; t < s.S; ++t)
        for (int64_t b = 0; b < blocks; ++b)
          segments.push_back({b * block + r * tap_down + t * tap_step,
                              std::min<int64_t>(pitch, channels - b * kLanes)});
    }
  }
  int64_t floats() const { return blocks * block; }

 private:
  // Half a register tile suffices for a row's last one where it covers the rest.
  static constexpr int64_t kHalf = kMaxRows / 2;
  static int64_t halves(const ConvSizes& s) { return (s.conv_x + kHalf - 1) / kHalf; }
  bool few() const { return channels <= kFewChannels; }
};

// Lane L of vector O of N interleaved rows, where row C is merged into those before it.
template <int N, int O, int C, int... L>
constexpr vi interleaving(std::integer_sequence<int, L...>) {
  const auto lane = [](int l) {
    const int row = (O * kLanes + l) % N, at = (O * kLanes + l) / N;
    return row == C ? kLanes + at : (C == 1 ? at : l);
  };
  return vi{lane(L)...};
}

template <int N, int O, int C>
inline vf merged(const vf (&rows)[N]) {
  constexpr vi lanes = interleaving<N, O, C>(std::make_integer_sequence<int, kLanes>());
  if constexpr (C == 1)
    return __builtin_shuffle(rows[0], rows[1], lanes);
  else
    return __builtin_shuffle(merged<N, O, C - 1>(rows), rows[C], lanes);
}

template <int N, int O = 0>
inline void store_merged(const vf (&rows)[N], float* to) {
  store(to + O * kLanes, merged<N, O, N - 1>(rows));
  if constexpr (O + 1 < N) store_merged<N, O + 1>(rows, to);
}

// to[i * N + c] = from[c * step + i], i < n, c < N.
template <int N>
void interleave(const float* from, int64_t step, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vf rows[N];
    for (int c = 0; c < N; ++c) rows[c] = load(from + c * step + i);
    store_merged(rows, to + i * N);
  }
  for (; i < n; ++i)
    for (int c = 0; c < N; ++c) to[i * N + c] = from[c * step + i];
}

// One row of a strip whose columns are not dense, n channels of each pixel, from row `y` of x.
inline void pack_apart(const ConvSizes& s, const ConvMap<const float>& x, const StripPlan& plan,
                       int64_t b, int64_t c, int n, int64_t y, float* to) {
  std::fill_n(to, plan.row, 0.0f);
  for (int64_t j = 0; j < plan.columns.size; ++j, to += plan.pitch) {
    const int64_t column = plan.columns.place(j) - s.left;
    if (column < 0 || column >= s.X) continue;
    const float* from = x.at(b, c, y, column);
    for (int ch = 0; ch < n; ++ch) to[ch] = from[ch * x.c];
  }
}

// Fills the strip for output rows from y on, of the channels of group g of image b.
inline void pack_strip(const ConvSizes& s, const ConvMap<const float>& x, const StripPlan& plan,
                       int64_t b, int64_t g, int64_t y, float* strip) {
  const int64_t first = y * s.stride_y - s.top;
  // Columns of the strip that lie within the picture.
  const int64_t columns = plan.columns.size;
  const int64_t left = std::clamp<int64_t>(s.left, 0, columns);
  const int64_t right = std::clamp<int64_t>(s.X + s.left, left, columns);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t c = g * plan.channels + block * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(plan.pitch, plan.channels - block * kLanes));
    for (int64_t i = 0; i < plan.rows.size; ++i) {
      float* to = strip + block * plan.block + i * plan.row;
      const int64_t from_y = first + plan.rows.place(i);
      if (from_y < 0 || from_y >= s.Y) {
        std::fill_n(to, plan.row, 0.0f);
        continue;
      }
      if (!plan.columns.dense) {
        pack_apart(s, x, plan, b, c, n, from_y, to);
        continue;
      }
      std::fill_n(to, left * plan.pitch, 0.0f);
      std::fill_n(to + right * plan.pitch, (columns - right) * plan.pitch, 0.0f);
      const float* from = x.at(b, c, from_y, left - s.left);
      to += left * plan.pitch;
      const int64_t width = right - left;
      if (x.c == 1 && x.x == plan.pitch && n == plan.pitch) {
        std::copy_n(from, width * n, to);
      } else if (x.c == 1 && n == kLanes) {
        for (int64_t j = 0; j < width; ++j) store(to + j * kLanes, load(from + j * x.x));
      } else if (x.c == 1) {
        for (int64_t j = 0; j < width; ++j, from += x.x, to += plan.pitch) std::copy_n(from, n, to);
      } else if (x.x == 1 && plan.pitch == kLanes) {
        transpose_rows({from, x.c, nullptr}, 0, n, 0, width, to, kLanes);
      } else if (x.x == 1 && n == 1) {
        std::copy_n(from, width, to);
      } else if (x.x == 1 && n == 2) {
        interleave<2>(from, x.c, width, to);
      } else if (x.x == 1 && n == 3) {
        interleave<3>(from, x.c, width, to);
      } else if (x.x == 1 && n == 4) {
        interleave<4>(from, x.c, width, to);
      } else {
        for (int64_t j = 0; j < width; ++j)
          for (int ch = 0; ch < n; ++ch) to[j * plan.pitch + ch] = from[j * x.x + ch * x.c];
      }
    }
  }
}

}  // namespace mbm::MBM_ISA
