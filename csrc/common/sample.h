// A number that tells a tensor from the same memory written over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace mbm {

constexpr int64_t kSamples = 32;

// Of up to 32 words of 8 bytes, evenly spaced, the first and the last among them.
inline uint64_t sample(const unsigned char* data, int64_t bytes) {
  uint64_t mixed = static_cast<uint64_t>(bytes);
  const int64_t words = (bytes + 7) / 8, count = std::min(words, kSamples);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = 8 * (count > 1 ? i * (words - 1) / (count - 1) : 0);
    uint64_t word = 0;
    std::memcpy(&word, data + at, static_cast<size_t>(std::min<int64_t>(8, bytes - at)));
    mixed = (mixed ^ word) * 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio
    mixed ^= mixed >> 32;
  }
  return mixed;
}

}  // namespace mbm
