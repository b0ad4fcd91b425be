// Products with weights of which a mask has made some 0: what such a weight meets may be anything,
// and 0 times an infinity or a NaN is a NaN. The product is taken as it is; where its result is not
// finite, it is taken again with what is not finite only in the pairs that attend.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/scratch.h"
#include "common/small_matmul.h"

namespace mbm::MBM_ISA {
namespace {

// Whether an element of x [rows, width] is an infinity or a NaN.
inline bool any_special(int64_t rows, int64_t width, const float* x, int64_t stride) {
  vf found = zero();  // 0 times anything finite
  for (int64_t r = 0; r < rows; ++r, x += stride)
    for (int64_t i = 0; i < width; i += kLanes)
      found = fma(load_part(x + i, width - i), zero(), found);
  return any_nan(found);
}

// out [I, E] = w m as matmul() does, w [I, J], but for special elements of m [J, E]: these meet the
// rows i with attends(i, j) alone. Elements that no special one reaches have matmul()'s bits.
template <class Attends>
void without_hidden_pairs(int64_t I, int64_t J, int64_t E, const float* w, int64_t w_stride,
                          const float* m, int64_t m_stride, float* out, int64_t out_stride,
                          const Attends& attends) {
  if (!any_special(J, E, m, m_stride)) return;
  const Scratch memory(sizeof(float) * static_cast<size_t>(J * E));
  float* finite = memory.as<float>();
  for (int64_t j = 0; j < J; ++j)
    for (int64_t e = 0; e < E; ++e) {
      const float x = m[j * m_stride + e];
      finite[j * E + e] = std::isfinite(x) ? x : 0.0f;
    }
  matmul(I, J, E, w, w_stride, finite, E, out, out_stride);
  for (int64_t j = 0; j < J; ++j)
    for (int64_t e = 0; e < E; ++e) {
      const float x = m[j * m_stride + e];
      if (std::isfinite(x)) continue;
      for (int64_t i = 0; i < I; ++i)
        if (attends(i, j)) out[i * out_stride + e] += w[i * w_stride + j] * x;
    }
}

}  // namespace
}  // namespace mbm::MBM_ISA
