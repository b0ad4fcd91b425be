// A classifier's linear layer behind convolutions: y [B, K] = activation(x [B, C] W^T + bias),
// float32. Sizes may be 0.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/problem_fields.h"
#include "conv_bias_act/activation.h"

namespace mbm {

struct LinearHead {
  int64_t B, C, K;
  Activation activation;

  // Throws std::invalid_argument for sizes whose products overflow.
  void check() const {
    for (const int64_t size : {B, C, K})
      check_field("a size of a linear layer", size, 0, int64_t{1} << 31);
  }
};

// weight [K, C], read where it lies; bias [K] or null. Bitwise the same for any num_threads.
MBM_PER_ISA(void, linear_head,
            (const LinearHead& head, const float* x, const float* weight, const float* bias,
             float* y, int num_threads))

}  // namespace mbm
