// tanh with its derivative.
#pragma once

#include "common/activations.h"

namespace mbm::MBM_ISA {

struct TanhAndSlope {
  vf value;  // as tanh(x), to the bit
  vf slope;  // 1 - tanh(x)^2
};

// u (2 - u) of the tail u = 1 - |tanh x| = 2 e / (1 + e), e = e^-2|x|: where tanh rounds to 1 its
// value has no digit left of the slope, and the square of a rounded tanh would leave 3e-7, most of
// it of one sign.
inline vf slope_of_tail(vf u) { return u * (set1(2.0f) - u); }

// The slope to 1.2e-7 absolute, and however small to a few roundings relative.
inline TanhAndSlope tanh_and_slope(vf x) {
  const vf exponent = set1(-2.0f) * abs(x);
  const ExpParts parts = exp_parts(exponent);
  const vf em = fma(parts.poly, parts.scale, parts.scale - set1(1.0f)), sum = em + set1(2.0f);
  const vf e =
      (vf)((vi)fma(parts.poly, parts.scale, parts.scale) & ~(vi)(exponent < set1(-87.33f)));
  return {copysign(-em / sum, x), slope_of_tail((e + e) / sum)};
}

inline vf tanh_slope(vf x) {
  const vf e = exp(set1(-2.0f) * abs(x));
  return slope_of_tail((e + e) / (set1(1.0f) + e));
}

}  // namespace mbm::MBM_ISA
