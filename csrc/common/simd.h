// Vectors of MBM_LANES floats as compiler vector extensions: the same source gives SSE2, AVX2 and
// AVX-512 code, and 16 lanes can be lowered to AVX2 for tests. Everything that would need an
// intrinsic or a mask register stays in this file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(MBM_ISA) || !defined(MBM_LANES)
#error "compile kernels with -DMBM_ISA=baseline|avx2|avx512 -DMBM_LANES=4|8|16"
#endif

namespace mbm::MBM_ISA {

constexpr int kLanes = MBM_LANES;

typedef float vf __attribute__((vector_size(4 * MBM_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * MBM_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * MBM_LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * MBM_LANES), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }

// Past the caches, to 4 kLanes-aligned memory that nothing reads soon; stream_end() before another
// thread may.
#if MBM_LANES == 16 && defined(__AVX512F__)
inline void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
#elif MBM_LANES == 8 && defined(__AVX__)
inline void stream(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
#else
inline void stream(float* p, vf v) { store(p, v); }
#endif
inline void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// `x - 0` keeps the sign of -0.0, which `x + 0` would lose.
inline vf set1(float x) { return x - vf{}; }
inline vf zero() { return vf{}; }

// The first n lanes, 0 <= n <= kLanes; the rest read as 0. Touches no byte past p + n.
#if defined(__AVX512F__) && MBM_LANES == 16
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline vf load_n(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
#elif defined(__AVX2__) && MBM_LANES == 8
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vf load_n(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first_lanes(n)); }
inline void store_n(float* p, vf v, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#else
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
#endif

// The first min(left, kLanes) lanes, left > 0: what a row has left at this place.
inline vf load_part(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, static_cast<int>(left));
}
inline void store_part(float* p, vf v, int64_t left) {
  if (left >= kLanes)
    store(p, v);
  else
    store_n(p, v, static_cast<int>(left));
}

// Contracted to one rounding where the ISA has FMA (-ffp-contract=fast), two in the baseline.
inline vf fma(vf a, vf b, vf c) { return a * b + c; }

// x86 semantics: the second operand where either is NaN. GCC 12 does not see the instruction in
// `a > b ? a : b` of vectors and compares, then blends: forward of additive_attention at T = 1
// takes 19 % longer so.
#if MBM_LANES == 16 && defined(__AVX512F__)
inline vf max(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif MBM_LANES == 8 && defined(__AVX__)
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif
#if MBM_LANES == 16 && defined(__AVX512F__)
inline bool any_nan(vf v) { return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0; }
#elif MBM_LANES == 8 && defined(__AVX__)
inline bool any_nan(vf v) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q)) != 0;
}
#else
inline bool any_nan(vf v) {
  const vi nan = v != v;
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= nan[i];
  return any != 0;
}
#endif
// Bit i is set where lane i of a is not below that of b: equal, above, or one of them NaN.
#if MBM_LANES == 16 && defined(__AVX512F__)
inline uint32_t not_below(vf a, vf b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
}
#elif MBM_LANES == 8 && defined(__AVX__)
inline uint32_t not_below(vf a, vf b) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
}
#else
inline uint32_t not_below(vf a, vf b) {
  const vi below = a < b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(below[i] == 0) << i;
  return bits;
}
#endif
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
// rows[i] += rows[i + width] for i a multiple of 2 width, lanes exchanged so that none is lost.
template <int width>
inline void fold_rows(vf* rows) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const vi odd = ((lane & width) != 0) & kLanes;  // lanes that come from rows[i + width]
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * width)
    rows[i] = __builtin_shuffle(rows[i], rows[i + width], lane + odd) +
              __builtin_shuffle(rows[i], rows[i + width], (lane ^ width) + odd);
  if constexpr (2 * width < kLanes) fold_rows<2 * width>(rows);
}
// Lane i of the result is the sum of rows[i], 0 <= i < kLanes: 2 kLanes shuffles in registers,
// where kLanes calls of sum() go through memory. Overwrites rows.
inline vf sum_rows(vf* rows) {
  fold_rows<1>(rows);
  return rows[0];
}
inline float max_lane(vf v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

}  // namespace mbm::MBM_ISA
