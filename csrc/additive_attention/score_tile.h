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
constexpr int kPackedV = 5;            // vectors of PackedV for each pair

enum class ScoreForm {
  kRatio,  // tanh = 1 - 2 / (x y + 1), absolute accuracy: |q| + |k| <= kRatioLimit
  kSmall   // tanh = m / (m + 1), m = a y + b, relative accuracy: |q| + |k| <= kSmallScore
};

// Scores of queries x 4 keys, with one division for two d:
//
//   w1 / d1 + w2 / d2 = (w1 d2 + w2 d1) / (d1 d2)                      d = x y + 1, w = -2 v
//   v1 m1 / (m1 + 1) + v2 m2 / (m2 + 1) = (both m1 m2 + v1 m1 + v2 m2) / ((m1 + 1) (m2 + 1))
//
// q [pairs][queries][2][kLanes], k [pairs][kKeys][2][y or y, b][kLanes],
// v [pairs][w1, w2, both, v1, v2][kLanes] with both = v1 + v2.
//
// On the way it asks for the lines that `ahead` points to, a few at each turn: as many at once
// would fill the core's miss buffers and stop its loads.
struct Ahead {
  const float *key, *value;  // anywhere: a prefetch never faults
  int64_t key_step, value_step;
};
template <ScoreForm form, int queries>
inline void score_tile(const float* q, const float* k, const float* v, int64_t pairs, vf* score,
                       Ahead* ahead) {
  constexpr int64_t kKeyStep = (form == ScoreForm::kRatio ? 1 : 2) * kPair;
  const vf one = set1(1.0f);
  vf sums[queries * kKeys] = {};
  for (int64_t g = 0; g < pairs; ++g) {
    const vf w1 = load(v), w2 = load(v + kLanes), both = load(v + 2 * kLanes);
    const vf v1 = load(v + 3 * kLanes), v2 = load(v + 4 * kLanes);
    if constexpr (queries == kQueries) {
      for (int i = 0; i < 2; ++i) {
        __builtin_prefetch(ahead->key + i * 16);
        __builtin_prefetch(ahead->value + i * 16);
      }
      ahead->key += ahead->key_step;
      ahead->value += ahead->value_step;
    }
#pragma GCC unroll 4
    for (int s = 0; s < kKeys; ++s) {
      const float* y = k + s * kKeyStep;
#pragma GCC unroll 4
      for (int t = 0; t < queries; ++t) {
        const float* a = q + t * kPair;
        vf term;
        if constexpr (form == ScoreForm::kRatio) {
          const vf d1 = fma(load(a), load(y), one);
          const vf d2 = fma(load(a + kLanes), load(y + kLanes), one);
          // `both` here rather than once at the end keeps the sums as small as the scores.
          term = fma(w1, d2, w2 * d1) / (d1 * d2) + both;
        } else {
          const vf m1 = fma(load(a), load(y), load(y + kLanes));
          const vf m2 = fma(load(a + kLanes), load(y + 2 * kLanes), load(y + 3 * kLanes));
          const vf numerator = fma(both, m1 * m2, fma(v2, m2, v1 * m1));
          term = numerator / ((m1 + one) * (m2 + one));
        }
        sums[t * kKeys + s] = sums[t * kKeys + s] + term;
      }
    }
    q += queries * kPair;
    k += kKeys * kKeyStep;
    v += kPackedV * kLanes;
  }
#pragma GCC unroll 16
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
    acc =
        fma(load_part(v + d, D - d), tanh(load_part(q + d, D - d) + load_part(k + d, D - d)), acc);
  const vf rows[4] = {acc};
  float sums[4];
  sum_wide<4>(rows, sums);
  return sums[0];
}

// v in pairs of vectors as score_tile takes it.
class PackedV {
 public:
  PackedV(const float* v, int64_t D)
      : pairs((D + kPair - 1) / kPair), memory_(sizeof(float) * (kPackedV * kLanes * pairs + 1)) {
    float* out = memory_.as<float>();
    for (int64_t d = 0; d < pairs * kPair; d += kPair, out += kPackedV * kLanes) {
      const vf v1 = load_from(v, d, D), v2 = load_from(v, d + kLanes, D);
      store(out, set1(-2.0f) * v1);
      store(out + kLanes, set1(-2.0f) * v2);
      store(out + 2 * kLanes, v1 + v2);
      store(out + 3 * kLanes, v1);
      store(out + 4 * kLanes, v2);
    }
    double squares = 0.0;
    for (int64_t d = 0; d < D; ++d) squares += static_cast<double>(v[d]) * v[d];
    // Not so with a NaN.
    factorable = squares <= kLargestV * kLargestV;
    precise = squares > kPreciseV * kPreciseV;
  }
  const float* data() const { return memory_.as<float>(); }

  int64_t pairs;
  bool factorable;  // at most kLargestV in length
  bool precise;     // too long for an error of eps |v| in a score to be lost in the softmax's own

 private:
  static vf load_from(const float* v, int64_t d, int64_t D) {
    return d < D ? load_part(v + d, D - d) : zero();
  }
  Scratch memory_;
};

}  // namespace
}  // namespace mbm::MBM_ISA
