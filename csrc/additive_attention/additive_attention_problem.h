// What is the same in every call of an additive attention: sizes, and strides in elements of the
// inputs as the kernels read them. Only the binding reads it.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include "common/problem_block.h"

namespace mbm {

// clang-format off
#define MBM_ADDITIVE_ATTENTION_PROBLEM(FIELD)                                          \
  FIELD(B) FIELD(T) FIELD(S) FIELD(D) FIELD(E)                                         \
  FIELD(query_b) FIELD(query_t) FIELD(key_b) FIELD(key_s) FIELD(value_b) FIELD(value_s) \
  FIELD(mask_b) FIELD(mask_t) FIELD(mask_s)
// clang-format on

struct AdditiveAttentionProblem {
  MBM_PROBLEM_FIELDS("additive_attention_problem_fields", MBM_ADDITIVE_ATTENTION_PROBLEM)

  void check() const {
    for (int64_t size : {B, T, S, D, E})
      if (size < 0) throw std::invalid_argument("problem: got a negative size");
  }
};

}  // namespace mbm
