// Bias, residual, activation and pool of finished sums, kLanes channels at a time.
#pragma once

#include <algorithm>
#include <limits>

#include "common/activations.h"
#include "common/gemm_pack.h"
#include "common/scratch.h"
#include "common/tanh_slope.h"
#include "conv_bias_act/conv_bias_act.h"

namespace mbm::MBM_ISA {

typedef uint8_t vb __attribute__((vector_size(MBM_LANES)));

constexpr int kLowBit = 128;  // of a place: f' is the smaller of two values

inline vf load_channels(const float* p, int n) { return n >= kLanes ? load(p) : load_n(p, n); }
inline void store_channels(float* p, vf v, int n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_n(p, v, n);
}

// exp that reaches infinity, so that -infinity / (1 + exp(infinity)) is NaN as in torch.
inline vf exp_to_infinity(vf v) {
  return v > set1(88.72284f) ? set1(std::numeric_limits<float>::infinity()) : exp(v);
}
inline vf clamp(vf v, float low, float high) {
  v = v < set1(low) ? set1(low) : v;
  return v > set1(high) ? set1(high) : v;
}
inline vf gelu_tanh_inner(vf z) { return set1(0.7978845608f) * (z + set1(0.044715f) * z * z * z); }

inline vf activate(Activation activation, vf z) {
  const vf one = set1(1.0f), half = set1(0.5f);
  switch (activation) {
    case Activation::kNone: return z;
    case Activation::kRelu: return max(zero(), z);
    case Activation::kRelu6: return clamp(z, 0.0f, 6.0f);
    case Activation::kLeakyRelu: return z > zero() ? z : set1(0.01f) * z;
    case Activation::kSilu: return z / (one + exp_to_infinity(-z));
    case Activation::kGelu: return z * half * (one + erf(z * set1(0.70710678f)));
    case Activation::kGeluTanh: return half * z * (one + tanh(gelu_tanh_inner(z)));
    case Activation::kHardswish:
      // 6 * (1 / 6) rounds to 1.
      return z * (clamp(z + set1(3.0f), 0.0f, 6.0f) * set1(1.0f / 6.0f));
    case Activation::kSigmoid: return one / (one + exp_to_infinity(-z));
    case Activation::kTanh: return tanh(z);
  }
  return z;
}

// f' for the activations whose z is saved.
inline vf activation_slope(Activation activation, vf z) {
  const vf one = set1(1.0f), half = set1(0.5f);
  switch (activation) {
    case Activation::kSilu: {
      const vf s = sigmoid(z);
      return s * (one + z * (one - s));
    }
    case Activation::kGelu: {
      const vf density = set1(0.3989422804f) * exp(-half * z * z);
      return half * (one + erf(z * set1(0.70710678f))) + z * density;
    }
    case Activation::kGeluTanh: {
      const vf inner = gelu_tanh_inner(z);
      const vf slope = set1(0.7978845608f) * (one + set1(3 * 0.044715f) * z * z);
      return half * (one + tanh(inner)) + half * z * tanh_slope(inner) * slope;
    }
    case Activation::kHardswish: {
      const vf middle = (z + z + set1(3.0f)) * set1(1.0f / 6.0f);
      return z <= set1(-3.0f) ? zero() : (z >= set1(3.0f) ? one : middle);
    }
    case Activation::kSigmoid: {
      const vf s = sigmoid(z);
      return s * (one - s);
    }
    case Activation::kTanh: return tanh_slope(z);
    default: return one;
  }
}

inline bool saves_z(Activation activation) { return activation >= Activation::kSilu; }

// Each comparison selects by itself: GCC 12 joins AVX-512 masks lane by lane in scalar registers.
// The larger; either NaN, b first.
inline vf larger(vf a, vf b) {
  const vf m = a > b ? a : b;
  return a != a ? a : m;
}

// Adds kLowBit where f' is the smaller of two values, from the activated value; NaN as in torch.
inline vi mark_low(Activation activation, vf a, vi place) {
  const vi marked = place | kLowBit;
  switch (activation) {
    case Activation::kRelu: return a <= zero() ? marked : place;
    case Activation::kRelu6: {
      const vi above = a >= set1(6.0f) ? marked : place;
      return a <= zero() ? marked : above;
    }
    case Activation::kLeakyRelu: return a > zero() ? place : marked;
    default: return place;
  }
}

inline void store_bytes(uint8_t* p, vi v, int n) {
  const vb bytes = __builtin_convertvector(v, vb);
  if (n >= kLanes)
    std::memcpy(p, &bytes, sizeof bytes);
  else
    std::memcpy(p, &bytes, static_cast<size_t>(n));
}
inline vi load_bytes(const uint8_t* p, int n) {
  vb bytes{};
  if (n >= kLanes)
    std::memcpy(&bytes, p, sizeof bytes);
  else
    std::memcpy(&bytes, p, static_cast<size_t>(n));
  return __builtin_convertvector(bytes, vi);
}

// Sums of a rectangle of the convolution: pixel (y, x), y0 <= y, x0 <= x, at
// sums + (y - y0) * row + (x - x0) * column, kLanes floats.
struct SumRegion {
  const float* sums;
  int64_t row, column, y0, x0;
};

// The residual of a rectangle as channel vectors: its own memory, or a transposed copy of it.
struct ResidualRegion {
  const float* data = nullptr;
  int64_t row = 0, column = 0, y0 = 0, x0 = 0;
};

struct Window {
  int64_t y0, y1, x0, x1, first_y, first_x;  // clipped to the map; unclipped origin
};

inline Window pool_window(const ConvSizes& s, int64_t p, int64_t q) {
  const int64_t y = p * s.pool_stride_y - s.pool_top, x = q * s.pool_stride_x - s.pool_left;
  return {std::max<int64_t>(y, 0),
          std::min(y + s.pool_y, s.conv_y),
          std::max<int64_t>(x, 0),
          std::min(x + s.pool_x, s.conv_x),
          y,
          x};
}

// The maximum of a window where the activation commutes with it, without the care that a NaN needs;
// false, with nothing written, where it does not or where there may be a NaN.
template <int fixed, class SumAt>
inline bool largest_without_nan(const ConvSizes& s, int64_t p, int64_t q, bool with_place,
                                const SumAt& sum_at, vf& best_z, vi& place, vf& best) {
  if constexpr (fixed != 0 && fixed != 1) return false;
  const Window w = pool_window(s, p, q);
  const int64_t first = (w.y0 - w.first_y) * s.pool_x + (w.x0 - w.first_x);
  vf largest = set1(-std::numeric_limits<float>::infinity()), total = zero();
  vi at = vi{} + static_cast<int>(first);
  for (int64_t y = w.y0; y < w.y1; ++y)
    for (int64_t x = w.x0; x < w.x1; ++x) {
      const vf z = sum_at(y, x);
      if (with_place) {
        const int index = static_cast<int>((y - w.first_y) * s.pool_x + (x - w.first_x));
        at = z > largest ? vi{} + index : at;
      }
      largest = max(largest, z);
      total = total + z;
    }
  if (any_nan(total)) return false;
  best_z = largest;
  place = at;
  best = activate(static_cast<Activation>(fixed), largest);
  return true;
}

// Outputs [p0, p1) x [q0, q1) of image b, channels k .. k + n, n <= kLanes, from their sums.
// kind: 0 where there is no pool, 2 for 2x2 windows side by side, 1 for any other.
// fixed: the activation, so that the compiler drops the others from the inner loop; -1: any.
template <int kind, int fixed>
void finish_rows(const ConvForward& args, int64_t b, int64_t k, int n, const SumRegion& region,
                 int64_t p0, int64_t p1, int64_t q0, int64_t q1, const ResidualRegion& residual,
                 float* staged) {
  const ConvSizes& s = args.sizes;
  const Activation activation = fixed < 0 ? s.activation : static_cast<Activation>(fixed);
  const vf bias = args.bias ? load_channels(args.bias + k, n) : zero();
  const bool nhwc = args.y.c == 1;
  for (int64_t p = p0; p < p1; ++p) {
    for (int64_t q = q0; q < q1; ++q) {
      vf best = zero(), best_z = zero();
      vi place{};
      const auto sum_at = [&](int64_t y, int64_t x) {
        vf z = load(region.sums + (y - region.y0) * region.row + (x - region.x0) * region.column);
        if (args.bias) z = z + bias;
        if (residual.data)
          z = z + load_channels(residual.data + (y - residual.y0) * residual.row +
                                    (x - residual.x0) * residual.column,
                                n);
        return z;
      };
      const auto take = [&](vf z, int index) {
        const vf a = activate(activation, z);
        const vi here = vi{} + index;
        place = a > best ? here : place;
        place = a != a ? here : place;
        best_z = a > best ? z : best_z;
        best_z = a != a ? z : best_z;
        best = larger(a, best);
      };
      if constexpr (kind == 0) {
        best_z = sum_at(p, q);
        best = activate(activation, best_z);
      } else if constexpr (kind == 2 && (fixed == 0 || fixed == 1)) {
        // relu commutes with the maximum: windows of equal values have gradient 0.
        const vf z0 = sum_at(2 * p, 2 * q), z1 = sum_at(2 * p, 2 * q + 1);
        const vf z2 = sum_at(2 * p + 1, 2 * q), z3 = sum_at(2 * p + 1, 2 * q + 1);
        const vf top = larger(z1, z0), low = larger(z3, z2);
        best_z = larger(low, top);
        if (args.places) {
          vi lower = z3 > z2 ? vi{} + 3 : vi{} + 2;
          lower = z3 != z3 ? vi{} + 3 : lower;
          place = z1 > z0 ? vi{} + 1 : vi{};
          place = z1 != z1 ? vi{} + 1 : place;
          place = low > top ? lower : place;
          place = low != low ? lower : place;
        }
        best = activate(activation, best_z);
      } else if constexpr (kind == 2) {
        best_z = sum_at(2 * p, 2 * q);
        best = activate(activation, best_z);
        take(sum_at(2 * p, 2 * q + 1), 1);
        take(sum_at(2 * p + 1, 2 * q), 2);
        take(sum_at(2 * p + 1, 2 * q + 1), 3);
      } else if (!largest_without_nan<fixed>(s, p, q, args.places != nullptr, sum_at, best_z, place,
                                             best)) {
        const Window w = pool_window(s, p, q);
        bool first = true;
        for (int64_t y = w.y0; y < w.y1; ++y)
          for (int64_t x = w.x0; x < w.x1; ++x) {
            const int index = static_cast<int>((y - w.first_y) * s.pool_x + (x - w.first_x));
            if (first) {
              best_z = sum_at(y, x);
              best = activate(activation, best_z);
              place = vi{} + index;
              first = false;
            } else {
              take(sum_at(y, x), index);
            }
          }
      }
      if (args.places) {
        const int64_t at = ((b * s.out_y + p) * s.out_x + q) * s.K + k;
        store_bytes(args.places + at, mark_low(activation, best, place), n);
        if (args.z) store_channels(args.z + at, best_z, n);
      }
      if (nhwc)
        store_channels(args.y.at(b, k, p, q), best, n);
      else
        store(staged + (q - q0) * kLanes, best);
    }
    if (!nhwc) {
      // Four pixels and four channels at a time: rows of pixels in, rows of channels out.
      if (args.y.x == 1) {
        transpose_rows({staged, kLanes, nullptr}, 0, static_cast<int>(q1 - q0), 0, n,
                       args.y.at(b, k, p, q0), args.y.c);
      } else {
        for (int64_t q = q0; q < q1; ++q)
          for (int i = 0; i < n; ++i) *args.y.at(b, k + i, p, q) = staged[(q - q0) * kLanes + i];
      }
    }
  }
}

inline int pool_kind(const ConvSizes& s) {
  if (s.pool_y == 1 && s.pool_x == 1 && s.pool_stride_y == 1 && s.pool_stride_x == 1) return 0;
  return s.pool_y == 2 && s.pool_x == 2 && s.pool_stride_y == 2 && s.pool_stride_x == 2 &&
                 s.pool_top == 0 && s.pool_left == 0
             ? 2
             : 1;
}

// Floats of `staged` that finish() needs for a rectangle of `height` x `width` pixels of the
// convolution: a copy of the residual's, then a row of outputs, which a pool whose windows reach
// into the padding can make longer than the convolution's.
inline int64_t staged_floats(const ConvSizes& s, int64_t height, int64_t width) {
  return (height * width + (pool_kind(s) == 1 ? s.out_x : width)) * kLanes;
}

// See finish_rows; the sums of rows [y0, y1) and columns [x0, x1) of the convolution are there.
inline void finish(const ConvForward& args, int64_t b, int64_t k, int n, const SumRegion& region,
                   int64_t y1, int64_t x1, int64_t p0, int64_t p1, int64_t q0, int64_t q1,
                   float* staged) {
  ResidualRegion residual;
  float* row = staged;
  if (args.residual.data) {
    const int64_t height = y1 - region.y0, width = x1 - region.x0;
    if (args.residual.c == 1) {
      residual = {args.residual.at(b, k, region.y0, region.x0), args.residual.y, args.residual.x,
                  region.y0, region.x0};
    } else {
      for (int64_t y = 0; y < height; ++y)
        transpose_rows({args.residual.at(b, k, region.y0 + y, region.x0), args.residual.c, nullptr},
                       0, n, 0, width, staged + y * width * kLanes, kLanes);
      residual = {staged, width * kLanes, kLanes, region.y0, region.x0};
      row = staged + height * width * kLanes;
    }
  }
  const auto run = [&](auto kind, auto fixed) {
    finish_rows<decltype(kind)::value, decltype(fixed)::value>(args, b, k, n, region, p0, p1, q0,
                                                               q1, residual, row);
  };
  const auto by_kind = [&](auto fixed) {
    switch (pool_kind(args.sizes)) {
      case 0: return run(std::integral_constant<int, 0>(), fixed);
      case 2: return run(std::integral_constant<int, 2>(), fixed);
      default: return run(std::integral_constant<int, 1>(), fixed);
    }
  };
  switch (args.sizes.activation) {
    case Activation::kNone: return by_kind(std::integral_constant<int, 0>());
    case Activation::kRelu: return by_kind(std::integral_constant<int, 1>());
    default: return by_kind(std::integral_constant<int, -1>());
  }
}

}  // namespace mbm::MBM_ISA
