// tanh with its derivative.
#pragma once

#include "common/activations.h"

namespace mbm::MBM_ISA {

struct TanhAndSlope {
  vf value;  // as tanh(x), to the bit
  vf slope;  // 1 - tanh(x)^2
};

// The slope to 3.0e-7 relative, however small: 4 e / (1 + e)^2 with e = e^-2|x|. Where tanh rounds
// to 1, its value has no digit left of the slope.
inline TanhAndSlope tanh_and_slope(vf x) {
  const vf exponent = set1(-2.0f) * abs(x);
  const ExpParts parts = exp_parts(exponent);
  const vf em = fma(parts.poly, parts.scale, parts.scale - set1(1.0f)), sum = em + set1(2.0f);
  const vf e =
      (vf)((vi)fma(parts.poly, parts.scale, parts.scale) & ~(vi)(exponent < set1(-87.33f)));
  return {copysign(-em / sum, x), set1(4.0f) * (e / (sum * sum))};
}

}  // namespace mbm::MBM_ISA
