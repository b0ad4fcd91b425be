// The k largest log-probabilities of each row of a linear head, float32: log_softmax(X W^T + b)
// with neither it nor the logits [R, V] in memory.
//
// R rows, H features, V classes. Rows are ordered by logit, NaN before all else and the lower class
// first where two are equal. A row with a NaN or +inf among its logits, or nothing above -inf, has
// NaN for every value, as log_softmax; its classes are in order all the same.
//
// Arrays are contiguous unless a stride is given, borrowed for the call, and do not overlap. R and
// H may be 0. Results are bitwise the same for any num_threads, and a row's do not depend on the
// other rows.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

constexpr int64_t kMostTopk = 16;

struct LinearTopk {
  int64_t R, H, V, k;   // 1 <= k <= min(V, kMostTopk), V < 2^31
  const float* hidden;  // [R, H], row r at hidden + r * hidden_stride
  int64_t hidden_stride;
  const float* packed;  // weight [V, H] as concat_linear_pack makes it
  const float* bias;    // [V] or null
  float* values;        // [R, k]
  int64_t* ids;         // [R, k]
};
MBM_PER_ISA(void, linear_topk, (const LinearTopk& args, int num_threads))

}  // namespace mbm
