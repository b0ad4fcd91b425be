#include <algorithm>

#include "common/few_rows.h"
#include "common/parallel.h"
#include "conv_bias_act/conv_epilogue.h"
#include "conv_bias_act/conv_head.h"

namespace mbm::MBM_ISA {

void linear_head(const LinearHead& head, const float* x, const float* weight, const float* bias,
                 float* y, int num_threads) {
  const auto [B, C, K, activation] = head;
  const int threads = B * C * K < kFewProducts ? 1 : num_threads;
  parallel_for(threads, K, kFewOutputs, [=](int64_t n0, int64_t n1) {
    for (int64_t b = 0; b < B; b += kFewRows) {
      const int64_t rows = std::min(kFewRows, B - b);
      float* out = y + b * K + n0;
      fill_few_rows(rows, n1 - n0, bias ? bias + n0 : nullptr, out, K);
      add_few_rows({x + b * C, C, C, weight + n0 * C, C, out, K}, rows, n1 - n0);
      if (activation == Activation::kNone) continue;
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < n1 - n0; n += kLanes) {
          float* p = out + m * K + n;
          store_part(p, activate(activation, load_part(p, n1 - n0 - n)), n1 - n0 - n);
        }
    }
  });
}

}  // namespace mbm::MBM_ISA
