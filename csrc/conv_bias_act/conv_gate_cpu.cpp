#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "conv_bias_act/conv_gate.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kSlice = 32;               // terms that one accumulator takes before it is folded
constexpr int kVectors = 4;                  // accumulators side by side
constexpr int64_t kPlanes = 2 * kLanes;      // of NCHW, of a piece of work
constexpr int64_t kFewElements = 64 << 10;   // below, one thread
constexpr int64_t kPieceElements = 8 << 10;  // of a piece of work of scale_planes

// The sum of n neighbours, spread over the lanes.
vf lanes_sum(const float* x, int64_t n) {
  constexpr int64_t step = kVectors * kLanes;
  vf total = zero();
  int64_t i = 0;
  while (i + kLanes <= n) {
    const int64_t end = std::min(n, i + kSlice * step);
    vf sums[kVectors] = {};
    for (; i + step <= end; i += step)
      for (int v = 0; v < kVectors; ++v) sums[v] = sums[v] + load(x + i + v * kLanes);
    for (; i + kLanes <= end; i += kLanes) sums[0] = sums[0] + load(x + i);
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return i < n ? total + load_n(x + i, static_cast<int>(n - i)) : total;
}

// Planes [begin, end), each of neighbours.
void means_of_planes(const DenseMap& map, const float* x, int64_t begin, int64_t end,
                     float* means) {
  const vf count = set1(static_cast<float>(map.pixels));
  for (; begin < end; begin += kLanes) {
    vf rows[kLanes] = {};
    const int64_t n = std::min<int64_t>(kLanes, end - begin);
    for (int64_t i = 0; i < n; ++i) rows[i] = lanes_sum(x + (begin + i) * map.pixels, map.pixels);
    store_part(means + begin, sum_rows(rows) / count, n);
  }
}

// Channels [c, c + n) of an image of channels_last, n <= kVectors * kLanes.
void means_of_channels(const DenseMap& map, const float* x, int64_t n, float* means) {
  const vf count = set1(static_cast<float>(map.pixels));
  vf totals[kVectors] = {};
  for (int64_t begin = 0; begin < map.pixels; begin += kSlice) {
    const int64_t end = std::min(map.pixels, begin + kSlice);
    vf sums[kVectors] = {};
    for (int64_t p = begin; p < end; ++p)
      for (int v = 0; v * kLanes < n; ++v)
        sums[v] = sums[v] + load_part(x + p * map.C + v * kLanes, n - v * kLanes);
    for (int v = 0; v < kVectors; ++v) totals[v] = totals[v] + sums[v];
  }
  for (int v = 0; v * kLanes < n; ++v)
    store_part(means + v * kLanes, totals[v] / count, n - v * kLanes);
}

vf gated(Gate gate, vf z) {
  if (gate == Gate::kNone) return z;
  z = z + set1(3.0f);
  z = z < zero() ? zero() : z;
  z = z > set1(6.0f) ? set1(6.0f) : z;
  return z * set1(1.0f / 6.0f);
}

void scale_run(const float* x, vf factor, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * factor);
  if (i < n) store_part(y + i, load_part(x + i, n - i) * factor, n - i);
}

}  // namespace

void plane_means(const DenseMap& map, const float* x, float* means, int num_threads) {
  const int threads = map.elements() < kFewElements ? 1 : num_threads;
  if (!map.channels_last) {
    parallel_for(threads, map.planes(), kPlanes,
                 [&](int64_t begin, int64_t end) { means_of_planes(map, x, begin, end, means); });
    return;
  }
  constexpr int64_t width = kVectors * kLanes;
  const int64_t parts = (map.C + width - 1) / width;
  parallel_for(threads, map.B * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t b = part / parts, c = part % parts * width;
      means_of_channels(map, x + b * map.pixels * map.C + c, std::min(width, map.C - c),
                        means + b * map.C + c);
    }
  });
}

void scale_planes(const DenseMap& map, const float* x, const float* factors, Gate gate, float* y,
                  int num_threads) {
  const int threads = map.elements() < kFewElements ? 1 : num_threads;
  const Scratch memory(sizeof(float) * map.planes());
  float* ready = memory.as<float>();
  for (int64_t i = 0; i < map.planes(); i += kLanes)
    store_part(ready + i, gated(gate, load_part(factors + i, map.planes() - i)), map.planes() - i);
  if (!map.channels_last) {
    const int64_t grain = std::max<int64_t>(1, kPieceElements / map.pixels);
    parallel_for(threads, map.planes(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        scale_run(x + p * map.pixels, set1(ready[p]), map.pixels, y + p * map.pixels);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kPieceElements / map.C);
  parallel_for(threads, map.B * map.pixels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const float* f = ready + p / map.pixels * map.C;
      for (int64_t c = 0; c < map.C; c += kLanes)
        store_part(y + p * map.C + c,
                   load_part(x + p * map.C + c, map.C - c) * load_part(f + c, map.C - c),
                   map.C - c);
    }
  });
}

}  // namespace mbm::MBM_ISA
