// tanh(q + k) without a transcendental function for each pair:
//
//   x = e^2q, y = e^2k, or x = e^-2q:                        tanh = 1 - 2 / (x y + 1)
//                                                            tanh = 1 - 2 x / (x + y)
//                                                            tanh = (y - x) / (x + y)
//   a = expm1(2q), y = e^2k / 2, b = expm1(2k) / 2:          m = a y + b = expm1(2 (q + k)) / 2 and
//                                                            tanh = m / (m + 1)
//
// The first two have the rounding of 2 / (x y + 1), up to 2 where tanh is below 0; the third costs
// more and has one below 1; the last costs most and has a relative error for small |q| + |k|. Where
// that is above kRatioLimit, or with an infinity or a NaN, tanh is computed for each pair
// (`direct_tanh`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "additive_attention/additive_attention.h"
#include "common/activations.h"
#include "common/small_matmul.h"

namespace mbm::MBM_ISA {
namespace {

// Of |q| + |k|: a product of two x y + 1 is below e^80, which leaves 1e3 for v.
constexpr float kRatioLimit = 20.0f;
constexpr double kLargestV = 1e3;  // |v|, in length
// Above kPreciseV, |v| in length, a score is (y - x) / (x + y) or, where |q| + |k| is up to
// kSmallScore, of relative accuracy.
constexpr float kSmallScore = 1.0f;
constexpr double kPreciseV = 1.5;

inline int64_t key_count(const AdditiveAttentionInputs& in, int64_t b) {
  if (in.key_lengths == nullptr) return in.S;
  // Under torch.compile nobody has looked at the values: stay inside the row.
  return std::min(std::max<int64_t>(in.key_lengths[b], 0), in.S);
}

// Keeps a product from being contracted into each of the sums it goes to: the adders are other
// pipes than the multipliers.
inline vf product_of(vf a, vf b) {
  vf p = a * b;
#if defined(__AVX512F__) || (defined(__x86_64__) && MBM_LANES < 16)  // one register holds it
  asm("" : "+v"(p));
#endif
  return p;
}

inline vi larger(vi a, vi b) { return a > b ? a : b; }

// Compared as integers, so that a NaN is above every number.
inline vi magnitude_bits(vf x) { return (vi)x & 0x7fffffff; }
inline float largest_of(vi bits) {
  alignas(64) int32_t lanes[kLanes];
  std::memcpy(lanes, &bits, sizeof bits);
  int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, lanes[i]);
  float x;
  std::memcpy(&x, &largest, sizeof x);
  return x;
}

// max |x| over rows of D; NaN with a NaN.
inline float max_magnitude(const float* x, int64_t stride, int64_t rows, int64_t D) {
  vi largest = {};
  for (int64_t row = 0; row < rows; ++row, x += stride)
    for (int64_t d = 0; d < D; d += kLanes)
      largest = larger(largest, magnitude_bits(load_part(x + d, D - d)));
  return largest_of(largest);
}

// y and b, each to its own last digits.
inline void key_factors(vf k, vf* y, vf* b) {
  ExpParts e = exp_parts(k + k);
  e.scale = e.scale * set1(0.5f);
  *y = fma(e.poly, e.scale, e.scale);
  *b = fma(e.poly, e.scale, e.scale - set1(0.5f));
}

// put(pair, 0 or 1, x) for each vector of a row up to padded_D, a multiple of two vectors; past D x
// counts as 0. Returns max |x|.
template <class Put>
inline float pack_row(const float* row, int64_t D, int64_t padded_D, const Put& put) {
  vi magnitude = {};
  int64_t pair = 0, d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes, ++pair) {
    const vf x1 = load(row + d), x2 = load(row + d + kLanes);
    magnitude = larger(magnitude, larger(magnitude_bits(x1), magnitude_bits(x2)));
    put(pair, 0, x1);
    put(pair, 1, x2);
  }
  for (; d < padded_D; d += 2 * kLanes, ++pair)
    for (int i = 0; i < 2; ++i) {
      const int64_t left = D - d - i * kLanes;
      const vf x = left > 0 ? load_part(row + d + i * kLanes, left) : zero();
      magnitude = larger(magnitude, magnitude_bits(x));
      put(pair, i, x);
    }
  return largest_of(magnitude);
}

// tanh x and 1 - tanh^2 of a single pair: e^-2|x| keeps the digits of a small slope, and both are
// exact at infinity.
inline vf direct_tanh(vf x, vf* slope) {
  const vf down = set1(-2.0f) * abs(x);
  const ExpParts e = exp_parts(down);
  const vf w = fma(e.poly, e.scale, e.scale), n = fma(e.poly, e.scale, e.scale - set1(1.0f));
  const vf den = n + set1(2.0f), t = -n / den, inverse = set1(1.0f) / den;
  const vf tail = down < set1(-80.0f) ? zero() : set1(4.0f) * w * (inverse * inverse);
  *slope = t < set1(0.5f) ? set1(1.0f) - t * t : tail;
  return copysign(t, x);
}

}  // namespace
}  // namespace mbm::MBM_ISA
