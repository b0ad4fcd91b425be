// Products with a weight [K, C] that is read once, where it lies: for tens of rows, where packing
// it takes as long as the product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"
#include "common/small_matmul.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kFewRows = 64;            // at a time
constexpr int64_t kFewOutputs = 32;         // of a piece of work
constexpr int64_t kFewFeatures = 1024;      // of one chain of sums: a tile of weights fits L1
constexpr int64_t kFewProducts = 64 << 10;  // below, one thread

// Rows lie `stride` apart.
struct FewRows {
  const float* x;  // [rows, features]
  int64_t x_stride;
  int64_t features;
  const float* weight;  // [outputs, features]
  int64_t weight_stride;
  float* y;  // [rows, outputs]
  int64_t y_stride;
};

// y = bias, for up to kFewOutputs outputs; a null bias is 0.
inline void fill_few_rows(int64_t rows, int64_t outputs, const float* bias, float* y,
                          int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < outputs; n += kLanes)
      store_part(y + m * y_stride + n, bias ? load_part(bias + n, outputs - n) : zero(),
                 outputs - n);
}

// y += x W^T, for up to kFewRows rows and kFewOutputs outputs.
inline void add_few_rows(const FewRows& p, int64_t rows, int64_t outputs) {
  float part[kFewRows * kFewOutputs];
  const int64_t slices = std::max<int64_t>(1, p.features / kFewFeatures);
  const int64_t step = round_up((p.features + slices - 1) / slices, kLanes);
  for (int64_t e = 0; e < p.features; e += step) {
    const int64_t width = std::min(step, p.features - e);
    matmul_nt(rows, outputs, width, p.x + e, p.x_stride, p.weight + e, p.weight_stride, part,
              outputs);
    for (int64_t m = 0; m < rows; ++m) {
      float* y = p.y + m * p.y_stride;
      const float* more = part + m * outputs;
      for (int64_t n = 0; n < outputs; n += kLanes)
        store_part(y + n, load_part(y + n, outputs - n) + load_part(more + n, outputs - n),
                   outputs - n);
    }
  }
}

}  // namespace
}  // namespace mbm::MBM_ISA
