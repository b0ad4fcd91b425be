// The gradient before the activation, grad_z [rows, X', K], spread from grad_y by the saved places.
#pragma once

#include "conv_bias_act/conv_epilogue.h"

namespace mbm::MBM_ISA {

inline int64_t padded_channels(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Where grad_z goes: pixel (y, x) at data + (y - y0) * row + x * column, padded_channels(K) floats.
struct GradRows {
  float* data;
  int64_t row, column, y0;
};

class GradZ {
 public:
  explicit GradZ(const ConvBackward& args)
      : args_(args), s_(args.sizes), kind_(pool_kind(s_)), padded_(padded_channels(s_.K)) {}

  int64_t padded() const { return padded_; }
  int64_t staged() const { return s_.out_x * padded_; }  // floats of `stage`

  // Rows [r0, r1) of image b. Adds to bias [padded], unless null, the gradients of the windows
  // whose first row is one of these, so that each counts once. Other memory of `to` stays as it is.
  void rows(int64_t b, int64_t r0, int64_t r1, const GradRows& to, float* bias,
            float* stage) const {
    if (kind_ == 1) {
      for (int64_t y = r0; y < r1; ++y)
        for (int64_t x = 0; x < s_.conv_x; ++x) std::fill_n(pixel(to, y, x), padded_, 0.0f);
    } else if (kind_ == 2) {  // what no window covers
      for (int64_t y = r0; y < r1; ++y)
        for (int64_t x = y < 2 * s_.out_y ? 2 * s_.out_x : 0; x < s_.conv_x; ++x)
          std::fill_n(pixel(to, y, x), padded_, 0.0f);
    }
    int64_t p0 = r0, p1 = r1;
    if (kind_ == 2) {
      p0 = r0 / 2;
      p1 = std::min(s_.out_y, (r1 + 1) / 2);
    } else if (kind_ == 1) {
      p0 = std::max<int64_t>(0, (r0 + s_.pool_top - s_.pool_y) / s_.pool_stride_y);
      p1 = std::min(s_.out_y, (r1 - 1 + s_.pool_top) / s_.pool_stride_y + 1);
    }
    for (int64_t p = p0; p < p1; ++p) switch (s_.activation) {
        case Activation::kNone:
        case Activation::kRelu:
        case Activation::kRelu6: row<true>(b, p, r0, r1, to, bias, stage); break;
        default: row<false>(b, p, r0, r1, to, bias, stage);
      }
  }

 private:
  static float* pixel(const GradRows& to, int64_t y, int64_t x) {
    return to.data + (y - to.y0) * to.row + x * to.column;
  }

  // One row of windows. all_or_none: f' is 0 or 1.
  template <bool all_or_none>
  void row(int64_t b, int64_t p, int64_t r0, int64_t r1, const GradRows& to, float* bias,
           float* stage) const {
    const float* grad = args_.grad_y.at(b, 0, p, 0);
    int64_t step = args_.grad_y.x;
    if (args_.grad_y.c != 1) {
      transpose_rows({grad, args_.grad_y.c, nullptr}, 0, static_cast<int>(s_.K), 0, s_.out_x, stage,
                     padded_);
      grad = stage;
      step = padded_;
    }
    const int64_t saved = (b * s_.out_y + p) * s_.out_x * s_.K;
    const uint8_t* places = args_.places ? args_.places + saved : nullptr;
    const float* z = args_.z ? args_.z + saved : nullptr;
    for (int64_t q = 0; q < s_.out_x; ++q, grad += step)
      for (int64_t k = 0; k < s_.K; k += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, s_.K - k));
        vf g = load_channels(grad + k, n);
        vi place{};
        if (places) place = load_bytes(places + q * s_.K + k, n);
        const vi low = place & kLowBit, at = place & (kLowBit - 1);
        if constexpr (all_or_none)
          g = low != 0 ? zero() : g;
        else if (s_.activation == Activation::kLeakyRelu)
          g = low != 0 ? set1(0.01f) * g : g;
        else
          g = g * activation_slope(s_.activation, load_channels(z + q * s_.K + k, n));
        if (spread(p, q, k, r0, r1, g, at, to) && bias) store(bias + k, load(bias + k) + g);
      }
  }

  // Adds g to its place of window (p, q); whether the window's first row is one of these.
  bool spread(int64_t p, int64_t q, int64_t k, int64_t r0, int64_t r1, vf g, vi at,
              const GradRows& to) const {
    if (kind_ == 0) {
      store(pixel(to, p, q) + k, g);
      return true;
    }
    if (kind_ == 2) {
      const int64_t y = 2 * p;
      float* first = pixel(to, y, 2 * q) + k;
      if (y >= r0) {
        store(first, at == 0 ? g : zero());
        store(first + to.column, at == 1 ? g : zero());
      }
      if (y + 1 >= r0 && y + 1 < r1) {
        store(first + to.row, at == 2 ? g : zero());
        store(first + to.row + to.column, at == 3 ? g : zero());
      }
      return y >= r0;
    }
    const Window w = pool_window(s_, p, q);
    for (int64_t y = std::max(w.y0, r0); y < std::min(w.y1, r1); ++y)
      for (int64_t x = w.x0; x < w.x1; ++x) {
        const int index = static_cast<int>((y - w.first_y) * s_.pool_x + (x - w.first_x));
        float* sum = pixel(to, y, x) + k;
        store(sum, load(sum) + (at == index ? g : zero()));
      }
    return w.y0 >= r0 && w.y0 < r1;
  }

  const ConvBackward& args_;
  const ConvSizes& s_;
  int kind_;
  int64_t padded_;
};

}  // namespace mbm::MBM_ISA
