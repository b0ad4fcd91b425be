// gpu.cuh for the host: see emulation.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/gpu/emulation.h"
#include "common/gpu/mma_layout.h"

#define MBM_DEVICE inline
#define MBM_KERNEL(threads, blocks) void

using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace mbm::gpu {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;
struct tf32 {
  float value;
};

inline int thread() { return emulation::thread(); }
inline int warp() { return thread() / 32; }
inline int lane() { return thread() % 32; }
inline int block() { return static_cast<int>(emulation::block()); }
inline int cluster_rank() { return emulation::cluster_rank(); }
inline int cluster_size() { return emulation::cluster_size(); }
inline char* shared() { return emulation::shared(); }
inline void block_barrier(const char* site) { emulation::block_barrier(site); }
inline void cluster_barrier(const char* site) { emulation::cluster_barrier(site); }

inline void warp_barrier(const char* site) { emulation::warp_barrier(site); }
inline void store_flag(uint32_t* flag, uint32_t value) { emulation::store_flag(flag, value); }
inline void wait_flag(const char* site, const uint32_t* flag, uint32_t value) {
  emulation::wait_flag(site, flag, value);
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t as_word(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline uint32_t shuffle_xor(uint32_t x, int mask) { return emulation::shuffle_xor(x, mask); }
inline float shuffle_xor(float x, int mask) { return as_float(shuffle_xor(as_word(x), mask)); }

inline void store_peer(float* p, int rank, float x) {
  *reinterpret_cast<float*>(emulation::peer(p, rank)) = x;
}

constexpr bool kHasClusters = true;
using Mbarrier = uint64_t;
inline void mbarrier_init(Mbarrier* m, int arrivals) { emulation::mbarrier_init(m, arrivals); }
inline void mbarrier_expect(Mbarrier* m, int bytes) { emulation::mbarrier_expect(m, bytes); }
inline void mbarrier_wait(const char* site, Mbarrier* m, int parity) {
  emulation::mbarrier_wait(site, m, parity);
}
inline void store_peer_async(uint4* p, Mbarrier* m, int rank, uint4 words) {
  emulation::store_peer_async(p, &words, sizeof(words), m, rank);
}

inline int opaque(int x) { return x; }
inline float reciprocal(float x) { return 1.0f / x; }
inline float maximum(float x, float y) { return x != x || x > y ? x : y; }
inline float exp(float x) { return std::exp(x); }
inline float expm1(float x) { return std::expm1(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float erf(float x) { return std::erf(x); }

inline float to_float(float x) { return x; }
inline float to_float(tf32 x) { return x.value; }
inline float to_float(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) { return static_cast<float>(x); }

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, tf32>)
    return {x};
  else
    return static_cast<T>(x);
}
template <>
inline bfloat16 from_float(float x) {
  const uint32_t bits = as_word(x);
  const bool nan = x != x;
  return {nan ? uint16_t{0x7fc0}
              : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
void store(T* p, int64_t i, float x) {
  p[i] = from_float<T>(x);
}

// To the nearest, ties away from zero.
template <class T>
T factor(T x) {
  if constexpr (std::is_same_v<T, tf32>)
    return x.value != x.value ? x : T{as_float((as_word(x.value) + 0x1000) & ~0x1fffu)};
  else
    return x;
}

inline uint4 load_words(const void* p) {
  uint4 words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}
inline uint4 load_words_l2(const void* p) { return load_words(p); }
inline void store_words(void* p, uint4 words) { std::memcpy(p, &words, sizeof(words)); }

inline void store_pair(void* p, uint32_t low, uint32_t high) {
  const uint32_t words[2] = {low, high};
  std::memcpy(p, words, sizeof(words));
}
template <class T>
void store_bits(T* p, int64_t i, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  std::memcpy(p + i, &half, sizeof(half));
}

inline uint32_t bits_of(bfloat16 x) { return x.bits; }
inline uint32_t bits_of(float16 x) {
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
template <class T>
float half_of(uint32_t word, int i) {
  const auto bits = static_cast<uint16_t>(word >> (16 * i));
  T x;
  std::memcpy(&x, &bits, sizeof(x));
  return to_float(x);
}

// What the instruction reads of a word.
template <class T>
float factor_of(const uint32_t* words, int i) {
  if constexpr (std::is_same_v<T, tf32>)
    return as_float(words[i] & ~0x1fffu);
  else
    return half_of<T>(words[i / 2], i % 2);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool kWide = std::is_same_v<T, tf32>;
  constexpr int kOfA = kWide ? 4 : 8, kOfB = kOfA / 2, kDepth = 2 * kOfA;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t all[32][6];
  emulation::gather(mine, 6, &all[0][0]);
  float rows[16][kDepth], columns[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < kOfA; ++i) {
      const MmaPlace at = kWide ? mma_place_of_wide_a(lane, i) : mma_place_of_a(lane, i);
      rows[at.row][at.column] = factor_of<T>(all[lane], i);
    }
    for (int i = 0; i < kOfB; ++i) {
      const MmaPlace at = kWide ? mma_place_of_wide_b(lane, i) : mma_place_of_b(lane, i);
      columns[at.column][at.row] = factor_of<T>(all[lane] + 4, i);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const MmaPlace at = mma_place_of_d(lane(), i);
    for (int k = 0; k < kDepth; ++k) d[i] += rows[at.row][k] * columns[at.column][k];
  }
}

}  // namespace mbm::gpu
