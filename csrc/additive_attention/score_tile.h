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
constexpr int kPackedV = 3;            // vectors of PackedV for each pair

enum class ScoreForm {
  kRatio,       // tanh = 1 - 2 x / (x + y), error eps (1 - tanh): |q| + |k| <= kRatioLimit
  kDifference,  // tanh = (y - x) / (x + y), error eps max(x, y) / (x + y): the same range
  kSmall        // tanh = m / (m + 1), m = a y + b, relative accuracy: |q| + |k| <= kSmallScore
};
// Vectors of a query and of a key for each pair: x x and w x w x, or a a; y y, or y b y b.
constexpr int query_vectors(ScoreForm form) { return form == ScoreForm::kSmall ? 2 : 4; }
constexpr int key_vectors(ScoreForm form) { return form == ScoreForm::kSmall ? 4 : 2; }

// Scores of queries x 4 keys, with one division for two d:
//
//   w1 x1 / d1 + w2 x2 / d2 = (w1 x1 d2 + w2 x2 d1) / (d1 d2)            d = x + y, w = -2 v
//   n1 / d1 + n2 / d2 = (n1 d2 + n2 d1) / (d1 d2)                        n = v y + w x, w = -v
//   v1 m1 / (m1 + 1) + v2 m2 / (m2 + 1) = (both m1 m2 + v1 m1 + v2 m2) / ((m1 + 1) (m2 + 1))
//
// The first leaves 3 products and the division to the multipliers and 4 additions to the adders,
// which are other pipes: by d = x y + 1 it would be 5 and 2, 3.5 cycles where this takes 2.5.
// The second takes 3.5 too.
//
// q [pairs][queries][query_vectors][kLanes], k [pairs][kKeys][key_vectors][kLanes],
// v [pairs][both, v1, v2][kLanes] with both = v1 + v2.
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
  constexpr int64_t kQueryStep = query_vectors(form) * kLanes;
  constexpr int64_t kKeyStep = key_vectors(form) * kLanes;
  const vf one = set1(1.0f);
  vf sums[queries * kKeys] = {};
  for (int64_t g = 0; g < pairs; ++g) {
    const vf both = load(v), v1 = load(v + kLanes), v2 = load(v + 2 * kLanes);
    if constexpr (queries == kQueries) {
      for (int i = 0; i < 2; ++i) {
        __builtin_prefetch(ahead->key + i * 16);
        __builtin_prefetch(ahead->value + i * 16);
      }
      ahead->key += ahead->key_step;
      ahead->value += ahead->value_step;
    }
#pragma GCC unroll 4
    for (int t = 0; t < queries; ++t) {
      const float* a = q + t * kQueryStep;
#pragma GCC unroll 4
      for (int s = 0; s < kKeys; ++s) {
        const float* y = k + s * kKeyStep;
        vf term;
        if constexpr (form != ScoreForm::kSmall) {
          const vf d1 = load(a) + load(y), d2 = load(a + kLanes) + load(y + kLanes);
          vf n1 = load(a + 2 * kLanes), n2 = load(a + 3 * kLanes);
          if constexpr (form == ScoreForm::kDifference) {
            n1 = fma(v1, load(y), n1);
            n2 = fma(v2, load(y + kLanes), n2);
          }
          term = fma(n1, d2, n2 * d1) / (d1 * d2);
          // `both` here rather than once at the end keeps the sums as small as the scores.
          if constexpr (form == ScoreForm::kRatio) term = term + both;
        } else {
          const vf m1 = fma(load(a), load(y), load(y + kLanes));
          const vf m2 = fma(load(a + kLanes), load(y + 2 * kLanes), load(y + 3 * kLanes));
          const vf numerator = fma(both, m1 * m2, fma(v2, m2, v1 * m1));
          term = numerator / ((m1 + one) * (m2 + one));
        }
        sums[t * kKeys + s] = sums[t * kKeys + s] + term;
      }
    }
    q += queries * kQueryStep;
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
  vd lanes = {};
  for (int64_t d = 0; d < D; d += kLanes)
    lanes += fold_halves(load_part(v + d, D - d) *
                         tanh(load_part(q + d, D - d) + load_part(k + d, D - d)));
  double total = 0.0;
  for (int i = 0; i < kWide; ++i) total += lanes[i];
  return static_cast<float>(total);
}

// Key s of a tile as score_tile takes it. Returns max |k|; where that is above kRatioLimit, what is
// packed means nothing. Past D k counts as 0, and meets a v of 0.
template <ScoreForm form>
inline float pack_key(const float* row, int64_t D, int64_t padded_D, float* tile, int s) {
  constexpr int64_t kStep = key_vectors(form) * kLanes;
  return pack_row(row, D, padded_D, [&](int64_t pair, int i, vf x) {
    float* to = tile + (pair * kKeys + s) * kStep + i * (kStep / 2);
    if constexpr (form == ScoreForm::kSmall) {
      vf y, b;
      key_factors(x, &y, &b);
      store(to, y);
      store(to + kLanes, b);
    } else {
      store(to, exp_in_range(x + x));
    }
  });
}

// v in pairs of vectors as score_tile takes it.
class PackedV {
 public:
  PackedV(const float* v, int64_t D)
      : pairs((D + kPair - 1) / kPair), memory_(sizeof(float) * (kPackedV * kLanes * pairs + 1)) {
    float* out = memory_.as<float>();
    for (int64_t d = 0; d < pairs * kPair; d += kPair, out += kPackedV * kLanes) {
      const vf v1 = load_from(v, d, D), v2 = load_from(v, d + kLanes, D);
      store(out, v1 + v2);
      store(out + kLanes, v1);
      store(out + 2 * kLanes, v2);
    }
    double squares = 0.0;
    for (int64_t d = 0; d < D; ++d) squares += static_cast<double>(v[d]) * v[d];
    // Not so with a NaN.
    factorable = squares <= kLargestV * kLargestV;
    precise = squares > kPreciseV * kPreciseV;
  }
  const float* data() const { return memory_.as<float>(); }
  vf vector(int64_t pair, int i) const { return load(data() + (pair * kPackedV + 1 + i) * kLanes); }

  int64_t pairs;
  bool factorable;  // at most kLargestV in length
  bool precise;     // too long for an error of kRatio in a score to be lost in the softmax's own

 private:
  static vf load_from(const float* v, int64_t d, int64_t D) {
    return d < D ? load_part(v + d, D - d) : zero();
  }
  Scratch memory_;
};

}  // namespace
}  // namespace mbm::MBM_ISA
