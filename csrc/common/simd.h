// Vectors of MBM_LANES floats as compiler vector extensions: the same source gives SSE2, AVX2 and
// AVX-512 code, and 16 lanes can be lowered to AVX2 for tests. Everything that would need an
// intrinsic or a mask register stays in this file.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(MBM_ISA) || !defined(MBM_LANES)
#error "compile kernels with -DMBM_ISA=baseline|avx2|avx512 -DMBM_LANES=4|8|16"
#endif

namespace mbm::MBM_ISA {

constexpr int kLanes = MBM_LANES;

typedef float vf __attribute__((vector_size(4 * MBM_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * MBM_LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * MBM_LANES), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }

// `x - 0` keeps the sign of -0.0, which `x + 0` would lose.
inline vf set1(float x) { return x - vf{}; }
inline vf zero() { return vf{}; }

// The first n lanes, 0 <= n <= kLanes; the rest read as 0. Touches no byte past p + n.
inline vf load_n(const float* p, int n) {
  alignas(64) float lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(float) * static_cast<size_t>(n));
  return load(lanes);
}
inline void store_n(float* p, vf v, int n) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(float) * static_cast<size_t>(n));
}

// Contracted to one rounding where the ISA has FMA (-ffp-contract=fast), two in the baseline.
inline vf fma(vf a, vf b, vf c) { return a * b + c; }

// x86 semantics: the second operand where either is NaN.
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
inline vf copysign(vf magnitude, vf sign) {
  return (vf)(((vi)magnitude & 0x7fffffff) | ((vi)sign & static_cast<int32_t>(0x80000000)));
}

// Lanes are added pairwise in one fixed order, so a sum does not depend on the thread count.
inline float sum(vf v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float max_lane(vf v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

}  // namespace mbm::MBM_ISA
