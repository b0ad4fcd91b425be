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

inline vf load_at_most(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, static_cast<int>(left));
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

// largest[d] = max over rows of keys[row, d] for d < D, 0 up to round_up(D, kLanes).
// Returns false if the keys cannot be factored: a NaN or a magnitude above kLargestTerm. rows >= 1.
inline bool largest_keys(const float* keys, int64_t stride, int64_t rows, int64_t D,
                         float* largest) {
  vi magnitude = {};
  for (int64_t s = 0; s < rows; ++s)
    for (int64_t d = 0; d < D; d += kLanes) {
      const vf k = load_at_most(keys + s * stride + d, D - d);
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
    const vf q = load_at_most(query + d, D - d);
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
    largest = larger(largest, magnitude_bits(load_at_most(x + d, n - d)));
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

// The first `left` lanes of v, 0 in the rest.
inline vf keep(vf v, int64_t left) {
  if (left >= kLanes || left <= 0) return v;
  alignas(64) float lanes[kLanes] = {};
  store_n(lanes, v, static_cast<int>(left));
  return load(lanes);
}

// Where vector i of a row goes in a panel of rows taken two vectors at a time.
struct PanelStep {
  int64_t vector, pair;
  int64_t at(int64_t i) const { return i / 2 * pair + i % 2 * vector; }
};

// 0 from D to padded_D, where m is then 0.
inline void pack_query(const float* query, const float* largest_key, int64_t D, int64_t padded_D,
                       float* panel, PanelStep step) {
  for (int64_t d = 0, i = 0; d < padded_D; d += kLanes, ++i) {
    vf a = zero(), unused;
    if (d < D)
      query_factors(load_at_most(query + d, D - d), shift_exponent(load(largest_key + d)), &a,
                    &unused);
    store(panel + step.at(i), keep(a, D - d));
  }
}

// y and, a vector further on, b.
inline void pack_key(const float* key, const float* largest_key, int64_t D, int64_t padded_D,
                     float* panel, PanelStep step) {
  for (int64_t d = 0, i = 0; d < padded_D; d += kLanes, ++i) {
    vf y = zero(), b = zero();
    if (d < D)
      key_factors(load_at_most(key + d, D - d), shift_exponent(load(largest_key + d)), &y, &b);
    store(panel + step.at(i), keep(y, D - d));
    store(panel + step.at(i) + kLanes, keep(b, D - d));
  }
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
