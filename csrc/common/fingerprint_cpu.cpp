#include <algorithm>
#include <cstring>
#include <vector>

#include "common/fingerprint.h"
#include "common/parallel.h"
#include "common/words.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kWords = 8;     // accumulators
constexpr int kStripes = 16;  // of 8 words each between two scrambles
constexpr int64_t kBlock = kStripes * kWords * 8;
constexpr int64_t kPiece = 256 << 10;  // half of an L2 cache; what one thread hashes at a time
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio, odd
constexpr uint64_t kPrime32 = 0x9e3779b1u;
constexpr int kVectors = kWords / kWordLanes;

// Keys of each place of a block and of the scramble, by splitmix64 (Steele et al. 2014).
struct Keys {
  uint64_t key[(kStripes + 1) * kWords];
  constexpr Keys() : key() {
    uint64_t state = 0;
    for (uint64_t& k : key) {
      state += kGolden;
      uint64_t z = state;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      k = z ^ (z >> 31);
    }
  }
};
constexpr Keys kKeys;

inline void accumulate(vq (&acc)[kVectors], const unsigned char* block) {
  for (int stripe = 0; stripe < kStripes; ++stripe)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const int word = stripe * kWords + i * kWordLanes;
      const vq data = load_words(block + 8 * word);
      const vq keyed = data ^ load_words(kKeys.key + word);
      acc[i] += halves_swapped(data) + low_products(keyed, keyed >> 32);
    }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    const vq key = load_words(kKeys.key + kStripes * kWords + i * kWordLanes);
    const vq mixed = acc[i] ^ (acc[i] >> 47) ^ key;
    const vq prime = vq{} + kPrime32;  // mixed * prime of 64 bits, by halves
    acc[i] = low_products(mixed, prime) + (low_products(mixed >> 32, prime) << 32);
  }
}

inline uint64_t combined(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * kGolden;
  return hash ^ (hash >> 32);
}

uint64_t piece_hash(const unsigned char* data, int64_t bytes) {
  vq acc[kVectors];
  for (int i = 0; i < kVectors; ++i) acc[i] = load_words(kKeys.key + i * kWordLanes);
  int64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) accumulate(acc, data + at);
  if (at < bytes) {
    unsigned char last[kBlock] = {};
    std::memcpy(last, data + at, static_cast<size_t>(bytes - at));
    accumulate(acc, last);
  }
  uint64_t words[kWords];
  std::memcpy(words, acc, sizeof(words));
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (uint64_t word : words) hash = combined(hash, word);
  return hash;
}

}  // namespace

uint64_t fingerprint(const unsigned char* data, int64_t bytes, int num_threads) {
  if (bytes <= kPiece) return piece_hash(data, bytes);
  std::vector<uint64_t> hashes(static_cast<size_t>((bytes + kPiece - 1) / kPiece));
  parallel_for(num_threads, bytes, kPiece, [&](int64_t begin, int64_t end) {
    hashes[static_cast<size_t>(begin / kPiece)] = piece_hash(data + begin, end - begin);
  });
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (uint64_t piece : hashes) hash = combined(hash, piece);
  return hash;
}

}  // namespace mbm::MBM_ISA
