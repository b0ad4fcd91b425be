// gpu.cuh for the host: see emulation.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/gpu/emulation.h"

#define MBM_DEVICE inline
#define MBM_KERNEL(threads, blocks) void

using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace mbm::gpu {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

inline int thread() { return emulation::thread(); }
inline int warp() { return thread() / 32; }
inline int lane() { return thread() % 32; }
inline int block() { return static_cast<int>(emulation::block()); }
inline int cluster_rank() { return emulation::cluster_rank(); }
inline int cluster_size() { return emulation::cluster_size(); }
inline char* shared() { return emulation::shared(); }
inline void block_barrier(const char* site) { emulation::block_barrier(site); }
inline void cluster_barrier(const char* site) { emulation::cluster_barrier(site); }

inline float shuffle_xor(float x, int mask) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(x));
  word = emulation::shuffle_xor(word, mask);
  std::memcpy(&x, &word, sizeof(x));
  return x;
}

inline void store_peer(float* p, int rank, float x) {
  *reinterpret_cast<float*>(emulation::peer(p, rank)) = x;
}

inline int opaque(int x) { return x; }
inline float reciprocal(float x) { return 1.0f / x; }
inline float exp(float x) { return std::exp(x); }
inline float expm1(float x) { return std::expm1(x); }
inline float tanh(float x) { return std::tanh(x); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}
inline float to_float(float16 x) { return static_cast<float>(x); }

inline void store(float* p, int64_t i, float x) { p[i] = x; }
inline void store(bfloat16* p, int64_t i, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool nan = x != x;
  p[i].bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float16* p, int64_t i, float x) { p[i] = static_cast<float16>(x); }

}  // namespace mbm::gpu
