// The activations of activations.h over arrays, so that tests can measure them in every build.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

enum class VectorFunction {
  kErf,
  kExp,
  kExpm1,
  kLog,
  kSigmoid,
  kSlope,
  kSoftplus,
  kTanh,
  kTanhSlope
};

// kSlope is that of softplus. y[i] = function(x[i]) for 0 <= i < n; x and y [n], may be the same.
MBM_PER_ISA(void, vector_math, (VectorFunction function, const float* x, float* y, int64_t n))

}  // namespace mbm
