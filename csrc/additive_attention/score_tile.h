// Scores of a few queries against a few keys, from what tanh_forms.h packs, and their sums over d.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "additive_attention/tanh_forms.h"
#include "common/activations.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kKeys = 4;               // keys of a tile
constexpr int kQueries = kLanes / 4;   // queries of a tile: kLanes sums in registers
constexpr int64_t kPair = 2 * kLanes;  // d of one turn of the loop

// scores of queries x 4 keys, with one division for two d:
//
//   v1 m1 / (m1 + 1) + v2 m2 / (m2 + 1) = ((v1 + v2) m1 m2 + v1 m1 + v2 m2) / ((m1 + 1) (m2 + 1))
//
// q [pairs][queries][2][kLanes], k [pairs][kKeys][2][y, b][kLanes], v [pairs][v1, v2,
// both][kLanes].
template <int queries>
inline void score_tile(const float* q, const float* k, const float* v, int64_t pairs, vf* score) {
  const vf one = set1(1.0f);
  vf sums[queries * kKeys] = {};
  for (int64_t g = 0; g < pairs; ++g) {
    const vf v1 = load(v), v2 = load(v + kLanes), both = load(v + 2 * kLanes);
#pragma GCC unroll 4
    for (int s = 0; s < kKeys; ++s) {
      const float* y = k + s * 4 * kLanes;
#pragma GCC unroll 4
      for (int t = 0; t < queries; ++t) {
        const float* a = q + t * kPair;
        const vf m1 = fma(load(a), load(y), load(y + kLanes));
        const vf m2 = fma(load(a + kLanes), load(y + 2 * kLanes), load(y + 3 * kLanes));
        const vf product = m1 * m2;
        const vf numerator = fma(both, product, fma(v2, m2, v1 * m1));
        // The second form saves a multiplication; without FMA its roundings show where m is -1/2.
        const vf denominator = kLanes == 4 ? (m1 + one) * (m2 + one) : product + ((m1 + m2) + one);
        sums[t * kKeys + s] = sums[t * kKeys + s] + numerator / denominator;
      }
    }
    q += queries * kPair;
    k += kKeys * 2 * kPair;
    v += 3 * kLanes;
  }
  for (int i = 0; i < queries * kKeys; ++i) score[i] = sums[i];
}

// Scores are summed over the lanes in double and rounded once: a score of 20 rounded at every step
// of a float sum is 2e-6 off, which the softmax hands on.
constexpr int kWide = kLanes / 2;
typedef double vd __attribute__((vector_size(8 * kWide)));
typedef int64_t vl __attribute__((vector_size(8 * kWide)));
typedef float vh __attribute__((vector_size(4 * kWide)));

inline vd fold_halves(vf v) {
  vh half[2];
  std::memcpy(half, &v, sizeof v);
  return __builtin_convertvector(half[0], vd) + __builtin_convertvector(half[1], vd);
}

// As fold_rows() of simd.h: lane i of rows[0] becomes the sum of rows[i], 0 <= i < kWide.
template <int width>
inline void fold_wide(vd* rows) {
  vl lane;
  for (int i = 0; i < kWide; ++i) lane[i] = i;
  const vl odd = ((lane & width) != 0) & kWide;
#pragma GCC unroll 8
  for (int i = 0; i < kWide; i += 2 * width)
    rows[i] = __builtin_shuffle(rows[i], rows[i + width], lane + odd) +
              __builtin_shuffle(rows[i], rows[i + width], (lane ^ width) + odd);
  if constexpr (2 * width < kWide) fold_wide<2 * width>(rows);
}

// sums[i] of each v[i]; `count` is a multiple of 4.
template <int count>
inline void sum_wide(const vf* v, float* sums) {
  for (int i = 0; i < count; i += kWide) {
    vd rows[kWide] = {};
    for (int j = 0; j < std::min(kWide, count - i); ++j) rows[j] = fold_halves(v[i + j]);
    fold_wide<1>(rows);
    const vh total = __builtin_convertvector(rows[0], vh);
    std::memcpy(sums + i, &total, sizeof(float) * std::min(kWide, count - i));
  }
}

inline float score_direct(const float* q, const float* k, const float* v, int64_t D) {
  vf acc = zero();
  for (int64_t d = 0; d < D; d += kLanes)
    acc = fma(load_at_most(v + d, D - d),
              tanh(load_at_most(q + d, D - d) + load_at_most(k + d, D - d)), acc);
  const vf rows[4] = {acc};
  float sums[4];
  sum_wide<4>(rows, sums);
  return sums[0];
}

// v in pairs of vectors, each with its sum: [pairs][v1, v2, both][kLanes].
class PackedV {
 public:
  PackedV(const float* v, int64_t D)
      : pairs((D + kPair - 1) / kPair), memory_(sizeof(float) * (3 * kLanes * pairs + 1)) {
    float* out = memory_.as<float>();
    for (int64_t d = 0; d < pairs * kPair; d += kPair, out += 3 * kLanes) {
      const vf v1 = load_from(v, d, D), v2 = load_from(v, d + kLanes, D);
      store(out, v1);
      store(out + kLanes, v2);
      store(out + 2 * kLanes, v1 + v2);
    }
    // Not so with a NaN or an infinity.
    bool small = true;
    for (int64_t d = 0; d < D; ++d) small &= v[d] >= -kLargestV && v[d] <= kLargestV;
    factorable = small;
  }
  const float* data() const { return memory_.as<float>(); }

  int64_t pairs;
  bool factorable;

 private:
  static vf load_from(const float* v, int64_t d, int64_t D) {
    return d < D ? load_at_most(v + d, D - d) : zero();
  }
  Scratch memory_;
};

}  // namespace
}  // namespace mbm::MBM_ISA
