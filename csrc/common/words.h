// Vectors of 64-bit words, for hashing; beside simd.h, whose vectors are of floats.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mbm::MBM_ISA {

#if defined(__AVX2__)
constexpr int kWordLanes = 4;
#else
constexpr int kWordLanes = 2;
#endif

typedef uint64_t vq __attribute__((vector_size(8 * kWordLanes)));

inline vq load_words(const void* p) {
  vq words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}

// The 64-bit products of the words' low halves.
inline vq low_products(vq a, vq b) {
#if defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline vq halves_swapped(vq a) { return (a << 32) | (a >> 32); }

}  // namespace mbm::MBM_ISA
