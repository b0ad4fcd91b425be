// What is the same in every call of a cross attention: sizes; the bits of the scale, a double;
// strides in elements of the inputs as the kernels read them and of the gradients; whether the mask
// is added; whether the weights returned are the mean over heads. Only the binding reads it.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include "common/problem_block.h"

namespace mbm {

// clang-format off
#define MBM_CROSS_ATTENTION_PROBLEM(FIELD)                                  \
  FIELD(B) FIELD(N) FIELD(T) FIELD(S) FIELD(D) FIELD(E) FIELD(scale_bits)   \
  FIELD(query_b) FIELD(query_n) FIELD(query_t)                              \
  FIELD(key_b) FIELD(key_n) FIELD(key_s)                                    \
  FIELD(value_b) FIELD(value_n) FIELD(value_s)                              \
  FIELD(mask_b) FIELD(mask_n) FIELD(mask_t) FIELD(mask_s) FIELD(mask_added) \
  FIELD(grad_query_b) FIELD(grad_query_n) FIELD(grad_query_t)               \
  FIELD(grad_key_b) FIELD(grad_key_n) FIELD(grad_key_s)                     \
  FIELD(grad_value_b) FIELD(grad_value_n) FIELD(grad_value_s)               \
  FIELD(mean_weights)
// clang-format on

struct CrossAttentionProblem {
  MBM_PROBLEM_FIELDS("cross_attention_problem_fields", MBM_CROSS_ATTENTION_PROBLEM)

  void check() const {
    for (int64_t size : {B, N, T, S, D, E})
      if (size < 0) throw std::invalid_argument("problem: got a negative size");
  }

  float scale() const {
    double value;
    std::memcpy(&value, &scale_bits, sizeof(value));
    return static_cast<float>(value);
  }
  // What a gradient of the weights returned is multiplied by for each head.
  float grad_weights_scale() const {
    return mean_weights && N > 0 ? static_cast<float>(1.0 / static_cast<double>(N)) : 1.0f;
  }
};

}  // namespace mbm
