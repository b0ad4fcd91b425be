// tanh(q + k) without a transcendental function for each pair. For any shift c,
//
//   a = expm1(2 (q + c)), y = e^(2 (k - c)) / 2, b = expm1(2 (k - c)) / 2:
//   m = a y + b = expm1(2 (q + k)) / 2 and tanh = m / (m + 1)
//
// With c near the largest k, y is at most 1 and -1/2 <= b <= 1/2, so that the sum loses no more
// than eps and tanh keeps its relative accuracy near 0 (1 - 2 / (1 + e^2q e^2k), one multiplication
// less, has 1e-7 absolute there). c is a multiple of ln(2) / 2, an addition to the exponents of
// e^2q and e^2k. a stays in range while q + c <= 15; beyond, or with an infinity or a NaN, tanh is
// computed for each pair (`direct_tanh`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "additive_attention/additive_attention.h"
#include "common/activations.h"
#include "common/small_matmul.h"

namespace mbm::MBM_ISA {
namespace {

// Of q + c: a product of two m + 1 is below e^62, which leaves 1e11 for the v of kLargestV.
constexpr float kPairLimit = 15.0f;
constexpr float kLargestV = 1e10f;
// Of |q| + |k|: the scores' product of two x y + 1 is below e^80.
constexpr float kRatioLimit = 20.0f;
// Scores of |q| + |k| up to here are computed to relative accuracy where |v| is above kPreciseV.
constexpr float kSmallScore = 1.0f;
constexpr double kPreciseV = 1.5;
constexpr float kLargestTerm = 43.0f;  // of |q| and |k|: e^86 is a float and e^-86 not subnormal

inline int64_t key_count(const AdditiveAttentionInputs& in, int64_t b) {
  if (in.key_lengths == nullptr) return in.S;
  // Under torch.compile nobody has looked at the values: stay inside the row.
  return std::min(std::max<int64_t>(in.key_lengths[b], 0), in.S);
}

// Keeps a product from being contracted into each of the sums it goes to: the adders are other
// pipes than the multipliers.
inline vf product_of(vf a, vf b) {
  vf p = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(p));
#endif
  return p;
}

inline vi larger(vi a, vi b) { return a > b ? a : b; }

// Integers in the order of the floats, and back; comparing them takes no mask registers.
inline vi ordered(vi bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Of the bits of |x|: above those of kLargestTerm too where x is a NaN.
inline vi magnitude_bits(vf x) { return (vi)x & 0x7fffffff; }
inline bool all_at_most(vi bits, float limit) {
  int32_t limit_bits;
  std::memcpy(&limit_bits, &limit, sizeof limit);
  alignas(64) int32_t lanes[kLanes];
  std::memcpy(lanes, &bits, sizeof lanes);
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= lanes[i] <= limit_bits;
  return all;
}

// Lanes of max |a| and max |b|, as bits: whether the largest of each sum to at most `limit`.
inline bool sum_at_most(vi a, vi b, float limit) {
  alignas(64) int32_t lanes[2 * kLanes];
  std::memcpy(lanes, &a, sizeof a);
  std::memcpy(lanes + kLanes, &b, sizeof b);
  int32_t largest[2] = {};
  for (int i = 0; i < kLanes; ++i) {
    largest[0] = std::max(largest[0], lanes[i]);
    largest[1] = std::max(largest[1], lanes[kLanes + i]);
  }
  float x[2];
  std::memcpy(x, largest, sizeof x);
  return x[0] + x[1] <= limit;  // false with a NaN
}

// largest[d] = max over rows of keys[row, d] for d < D, 0 up to round_up(D, kLanes).
// Returns false if the keys cannot be factored: a NaN or a magnitude above kLargestTerm. rows >= 1.
inline bool largest_keys(const float* keys, int64_t stride, int64_t rows, int64_t D,
                         float* largest) {
  vi magnitude = {};
  for (int64_t s = 0; s < rows; ++s)
    for (int64_t d = 0; d < D; d += kLanes) {
      const vf k = load_part(keys + s * stride + d, D - d);
      magnitude = larger(magnitude, magnitude_bits(k));
      const vi order = ordered((vi)k);
      store(largest + d, (vf)(s == 0 ? order : larger(order, (vi)load(largest + d))));
    }
  for (int64_t d = 0; d < D; d += kLanes) store(largest + d, (vf)ordered((vi)load(largest + d)));
  return all_at_most(magnitude, kLargestTerm);
}

// max over d of q + the largest key; infinity if some q cannot be factored. *largest_query: max
// |q|.
inline float query_bound(const float* query, const float* largest_key, int64_t D,
                         float* largest_query) {
  vi magnitude = {}, bound = ordered((vi)set1(-std::numeric_limits<float>::max()));
  for (int64_t d = 0; d < D; d += kLanes) {
    const vf q = load_part(query + d, D - d);
    magnitude = larger(magnitude, magnitude_bits(q));
    bound = larger(bound, ordered((vi)(q + load(largest_key + d))));
  }
  *largest_query = max_lane((vf)magnitude);
  return all_at_most(magnitude, kLargestTerm) ? max_lane((vf)ordered(bound))
                                              : std::numeric_limits<float>::infinity();
}

inline float max_magnitude(const float* x, int64_t n) {
  vi largest = {};
  for (int64_t d = 0; d < n; d += kLanes)
    largest = larger(largest, magnitude_bits(load_part(x + d, n - d)));
  return max_lane((vf)largest);
}

// 2 c / ln 2 at the place of a float's exponent; 0 for small keys, whose m then keeps its digits.
inline vi shift_exponent(vf largest_key) {
  return __builtin_convertvector(largest_key * set1(2.885390082f), vi) << 23;
}

// e^2x with `exponent` added to that of its scale; 0 where that is below the smallest float.
inline ExpParts shifted_exp(vf x, vi exponent) {
  ExpParts e = exp_parts(x + x);
  const vi scale = (vi)e.scale + exponent;
  e.scale = (vf)(scale > 0 ? scale : vi{});
  return e;
}

// a and a + 1, each to its own last digits.
inline void query_factors(vf q, vi shift, vf* a, vf* a_plus_1) {
  const ExpParts e = shifted_exp(q, shift);
  *a = fma(e.poly, e.scale, e.scale - set1(1.0f));
  *a_plus_1 = fma(e.poly, e.scale, e.scale);
}

inline void key_factors(vf k, vi shift, vf* y, vf* b) {
  const ExpParts e = shifted_exp(k, -shift - (1 << 23));
  *y = fma(e.poly, e.scale, e.scale);
  *b = fma(e.poly, e.scale, e.scale - set1(0.5f));
}

// Where the two vectors of a pair go in a panel of rows: the second `vector` after the first, the
// next pair `pair` further on.
struct PanelStep {
  int64_t vector, pair;
};

// What of a row score_tile() takes: e^2x, or with relative accuracy expm1(2x) of a query, and of a
// key y and, a vector further on, b.
enum class Panel { kRatio, kSmallQuery, kSmallKey };
template <Panel panel>
inline void pack_vector(vf x, float* to) {
  if constexpr (panel == Panel::kRatio) {
    const ExpParts e = exp_parts_in_range(x + x);
    store(to, fma(e.poly, e.scale, e.scale));
  } else if constexpr (panel == Panel::kSmallQuery) {
    store(to, expm1(x + x));
  } else {
    vf y, b;
    key_factors(x, vi{}, &y, &b);
    store(to, y);
    store(to + kLanes, b);
  }
}

// Returns the bits of max |x|; where that is above kLargestTerm, what is packed means nothing. Past
// D x counts as 0, and meets a v of 0.
template <Panel panel>
inline vi pack_row(const float* row, int64_t D, int64_t padded_D, float* out, PanelStep step) {
  vi magnitude = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes, out += step.pair) {
    const vf x1 = load(row + d), x2 = load(row + d + kLanes);
    magnitude = larger(magnitude, larger(magnitude_bits(x1), magnitude_bits(x2)));
    pack_vector<panel>(x1, out);
    pack_vector<panel>(x2, out + step.vector);
  }
  for (; d < padded_D; d += 2 * kLanes, out += step.pair)
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t left = D - d - i * kLanes;
      const vf x = left > 0 ? load_part(row + d + i * kLanes, left) : zero();
      magnitude = larger(magnitude, magnitude_bits(x));
      pack_vector<panel>(x, out + i * step.vector);
    }
  return magnitude;
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
