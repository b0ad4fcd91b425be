// tanh(q + k) = n / (n + 2) with n = expm1(2 (q + k)), and n without a transcendental function for
// each pair: for any shift c,
//
//   a = expm1(2 (q + c)), y = e^(2 (k - c)), b = expm1(2 (k - c)):   n = a y + b
//
// With c = max of k over the keys at hand y <= 1 and -1 <= b <= 0, so that the sum loses no more
// than eps |b| and tanh keeps its relative accuracy near 0 (1 - 2 / (1 + e^2q e^2k), one
// multiplication less, has 8 eps where tanh is -1 and 1e-7 absolute near 0). a stays in range while
// q + c <= 20; beyond, or with an infinity or a NaN, tanh is computed for each pair
// (`direct_tanh`).
#pragma once

#include <cstdint>
#include <limits>

#include "additive_attention/additive_attention.h"
#include "common/activations.h"
#include "common/simd.h"

namespace mbm::MBM_ISA {
namespace {

constexpr float kFactoredLimit = 20.0f;  // of q + c; (n + 2)^2 = e^80 is still a float

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t key_count(const AdditiveAttentionInputs& in, int64_t b) {
  return in.key_lengths == nullptr ? in.S : in.key_lengths[b];
}

inline vf load_at_most(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, static_cast<int>(left));
}

// shift[d] = max over rows of keys[row, d] for d < D, 0 up to round_up(D, kLanes).
// Returns false if a key is infinite or NaN. rows >= 1.
inline bool key_shift(const float* keys, int64_t stride, int64_t rows, int64_t D, float* shift) {
  vf poison = zero();
  for (int64_t s = 0; s < rows; ++s)
    for (int64_t d = 0; d < D; d += kLanes) {
      const vf k = load_at_most(keys + s * stride + d, D - d);
      poison = poison + (k - k);
      store(shift + d, s == 0 ? k : max(k, load(shift + d)));
    }
  return sum(poison) == 0.0f;
}

// max over d of q + shift; infinity if that or some q is not finite.
inline float query_bound(const float* query, const float* shift, int64_t D) {
  vf poison = zero(), largest = set1(-std::numeric_limits<float>::max());
  for (int64_t d = 0; d < D; d += kLanes) {
    const vf q = load_at_most(query + d, D - d) + load(shift + d);
    poison = poison + (q - q);
    largest = max(q, largest);
  }
  return sum(poison) == 0.0f ? max_lane(largest) : std::numeric_limits<float>::infinity();
}

inline float max_magnitude(const float* x, int64_t n) {
  vf largest = zero();
  for (int64_t d = 0; d < n; d += kLanes) largest = max(abs(load_at_most(x + d, n - d)), largest);
  return max_lane(largest);
}

// a + b, and what its rounding left out: an argument of 10 rounded to 1e-6 would show in tanh.
inline vf two_sum(vf a, vf b, vf* rest) {
  const vf s = a + b, b_part = s - a;
  *rest = (a - (s - b_part)) + (b - b_part);
  return s;
}

// a and a + 1 = e^(2 (q + c)), each to its own last digits.
inline void query_factors(vf q, vf shift, vf* a, vf* a_plus_1) {
  vf rest;
  const vf x = two_sum(q, shift, &rest);
  const ExpParts e = exp_parts(x + x);
  const vf e0 = fma(e.poly, e.scale, e.scale);
  *a_plus_1 = fma(rest + rest, e0, e0);
  *a = fma(rest + rest, e0, fma(e.poly, e.scale, e.scale - set1(1.0f)));
}

// y and b.
inline void key_factors(vf k, vf shift, vf* y, vf* b) { query_factors(k, -shift, b, y); }

// The first `left` lanes of v, 0 in the rest.
inline vf keep(vf v, int64_t left) {
  if (left >= kLanes || left <= 0) return v;
  alignas(64) float lanes[kLanes] = {};
  store_n(lanes, v, static_cast<int>(left));
  return load(lanes);
}

// Vectors of a `panel_stride` floats apart; 0 from D to padded_D, where n is then 0.
inline void pack_query(const float* query, const float* shift, int64_t D, int64_t padded_D,
                       float* panel, int64_t panel_stride) {
  for (int64_t d = 0; d < padded_D; d += kLanes, panel += panel_stride) {
    vf a = zero();
    vf unused;
    if (d < D) query_factors(load_at_most(query + d, D - d), load(shift + d), &a, &unused);
    store(panel, keep(a, D - d));
  }
}

// Pairs of vectors y, b `panel_stride` floats apart; 0 from D to padded_D.
inline void pack_key(const float* key, const float* shift, int64_t D, int64_t padded_D,
                     float* panel, int64_t panel_stride) {
  for (int64_t d = 0; d < padded_D; d += kLanes, panel += panel_stride) {
    vf y = zero(), b = zero();
    if (d < D) key_factors(load_at_most(key + d, D - d), load(shift + d), &y, &b);
    store(panel, keep(y, D - d));
    store(panel + kLanes, keep(b, D - d));
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
