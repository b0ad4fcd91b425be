#include "common/tanh_slope.h"
#include "common/vector_math.h"

namespace mbm::MBM_ISA {
namespace {

template <class F>
void apply(const float* x, float* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  const int tail = static_cast<int>(n - i);
  if (tail > 0) store_n(y + i, f(load_n(x + i, tail)), tail);
}

}  // namespace

void vector_math(VectorFunction function, const float* x, float* y, int64_t n) {
  switch (function) {
    case VectorFunction::kErf: return apply(x, y, n, [](vf v) { return erf(v); });
    case VectorFunction::kExp: return apply(x, y, n, [](vf v) { return exp(v); });
    case VectorFunction::kExpm1: return apply(x, y, n, [](vf v) { return expm1(v); });
    case VectorFunction::kLog: return apply(x, y, n, [](vf v) { return log(v); });
    case VectorFunction::kSigmoid: return apply(x, y, n, [](vf v) { return sigmoid(v); });
    case VectorFunction::kSlope: return apply(x, y, n, [](vf v) { return softplus(v).slope; });
    case VectorFunction::kSoftplus: return apply(x, y, n, [](vf v) { return softplus(v).value; });
    case VectorFunction::kTanh: return apply(x, y, n, [](vf v) { return tanh(v); });
    case VectorFunction::kTanhSlope:
      return apply(x, y, n, [](vf v) { return tanh_and_slope(v).slope; });
  }
}

}  // namespace mbm::MBM_ISA
