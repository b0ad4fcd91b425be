// A strip of input rows, padded with 0 and packed so that a register tile finds its pixels a fixed
// step apart, and the order in which a direct convolution runs through taps and channels.
#pragma once

#include <algorithm>
#include <vector>

#include "conv_bias_act/conv_bias_act.h"
#include "conv_bias_act/conv_micro.h"

namespace mbm::MBM_ISA {

// Up to here the channels of a pixel lie side by side, unpadded.
constexpr int64_t kFewChannels = 4;

struct StripPlan {
  int64_t channels;               // C / groups
  int64_t pitch;                  // floats of a pixel
  int64_t blocks;                 // of channels
  int64_t columns, rows;          // padded input pixels of the strip
  int64_t row, block;             // floats between rows, and between blocks of channels
  int64_t tiles_across;           // register tiles in a row of the output
  int64_t step;                   // floats between the rows of a register tile
  std::vector<Segment> segments;  // in the order of the packed weight: r, block, s, channel

  // For `height` rows of the convolution's output.
  StripPlan(const ConvSizes& s, int64_t height) : channels(s.C / s.groups) {
    const bool few = channels <= kFewChannels;
    pitch = few ? channels : kLanes;
    blocks = few ? 1 : (channels + kLanes - 1) / kLanes;
    // Half a tile suffices for the last one where it covers the rest.
    constexpr int64_t half = kMaxRows / 2;
    const int64_t halves = (s.conv_x + half - 1) / half;
    tiles_across = (halves + 1) / 2;
    // Few channels are computed in pairs of columns.
    const int64_t pixels = std::max(halves * half, (s.conv_x + 1) / 2 * 2);
    columns = (pixels - 1) * s.stride_x + (s.S - 1) * s.dilation_x + 1;
    rows = (height - 1) * s.stride_y + (s.R - 1) * s.dilation_y + 1;
    row = columns * pitch;
    block = rows * row;
    step = s.stride_x * pitch;
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t depth = few ? channels : std::min<int64_t>(kLanes, channels - b * kLanes);
        const int64_t at = b * block + r * s.dilation_y * row;
        if (few && s.dilation_x == 1)
          segments.push_back({at, s.S * depth});
        else
          for (int64_t t = 0; t < s.S; ++t)
            segments.push_back({at + t * s.dilation_x * pitch, depth});
      }
  }
  int64_t floats() const { return blocks * block; }
};

// Fills the strip for output rows from y on, of the channels of group g of image b.
inline void pack_strip(const ConvSizes& s, const ConvMap<const float>& x, const StripPlan& plan,
                       int64_t b, int64_t g, int64_t y, float* strip) {
  const int64_t first = y * s.stride_y - s.top;
  // Columns of the strip that lie within the picture.
  const int64_t left = std::clamp<int64_t>(s.left, 0, plan.columns);
  const int64_t right = std::clamp<int64_t>(s.X + s.left, left, plan.columns);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t c = g * plan.channels + block * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(plan.pitch, plan.channels - block * kLanes));
    for (int64_t i = 0; i < plan.rows; ++i) {
      float* to = strip + block * plan.block + i * plan.row;
      if (first + i < 0 || first + i >= s.Y) {
        std::fill_n(to, plan.row, 0.0f);
        continue;
      }
      std::fill_n(to, left * plan.pitch, 0.0f);
      std::fill_n(to + right * plan.pitch, (plan.columns - right) * plan.pitch, 0.0f);
      const float* from = x.at(b, c, first + i, left - s.left);
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
      } else {
        for (int64_t j = 0; j < width; ++j)
          for (int ch = 0; ch < n; ++ch) to[j * plan.pitch + ch] = from[j * x.x + ch * x.c];
      }
    }
  }
}

}  // namespace mbm::MBM_ISA
