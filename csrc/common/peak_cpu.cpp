#include "common/parallel.h"
#include "common/peak.h"
#include "common/simd.h"

namespace mbm::MBM_ISA {
namespace {

// Two FMAs a cycle of four cycles' latency need eight chains; 12 leave registers for a and b.
constexpr int kChains = 12;

float chains(int64_t iterations, float start) {
  vf acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = set1(start + static_cast<float>(c));
  const vf a = set1(0.5f), b = set1(1.0f);
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], a, b);
  vf total = zero();
  for (int c = 0; c < kChains; ++c) total = total + acc[c];
  return sum(total);
}

}  // namespace

int64_t peak_operations() { return 2 * kChains * kLanes; }

float peak_run(int64_t iterations, int num_threads) {
  std::atomic<float> total{0.0f};
  parallel_region(num_threads, [&](int thread, int) {
    total.store(chains(iterations, static_cast<float>(thread)), std::memory_order_relaxed);
  });
  return total.load(std::memory_order_relaxed);
}

}  // namespace mbm::MBM_ISA
