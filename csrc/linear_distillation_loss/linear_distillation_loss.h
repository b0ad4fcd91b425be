// A linear head's cross-entropy and its divergence from a teacher, with the gradients in the same
// pass where they are wanted.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace mbm {

enum class Teacher { kHidden = 0, kLogits = 1, kTopk = 2 };
enum class Divergence { kForwardKl = 0, kReverseKl = 1, kJsd = 2 };

// All arrays are contiguous and overlap nowhere. Rows whose target is ignore_index are not
// computed and nothing of them is read: neither side's hidden states, no logits, ids or gradients
// of results. A row with another target that is no class, or with such an id, has NaN for all
// results and gradients; in the sums over rows these make all NaN. One teacher: hidden states and
// weight, logits, or k ids with log-probabilities.
struct LinearDistillation {
  int64_t N, Hs, Ht, V, k;
  Teacher teacher;
  const float* student_hidden;  // [N, Hs]
  const float* student_weight;  // [V, Hs]
  const float* student_bias;    // [V], or null: 0; above -inf
  const int64_t* target;        // [N], ignore_index or 0 <= target < V, any other: NaN
  const float* teacher_hidden;  // [N, Ht] or null
  const float* teacher_weight;  // [V, Ht], with teacher_hidden
  const float* teacher_bias;    // [V], or null: 0; above -inf
  const float* teacher_logits;  // [N, V] or null
  const int64_t* topk_ids;      // [N, k] or null; 0 <= id < V, any other: NaN; a row's differ
  const float* topk_log_probs;  // [N, k], with topk_ids; over all V, at temperature 1
  int64_t ignore_index;
  float temperature, hard_weight, beta;  // 0 < beta < 1 for kJsd
  Divergence divergence;
  RowReduction reduction;
  const float* grad_loss;  // each as its result, null: 0; all three null: 1, 0, 0
  const float* grad_hard;
  const float* grad_soft;
  float* loss;  // each [N] for kNone, else [1]; written unless null
  float* hard;
  float* soft;
  float* grad_hidden;  // [N, Hs], written; null: not wanted. The student's, as the next two
  float* grad_weight;  // [V, Hs], written; null: not wanted
  float* grad_bias;    // [V], written; null: not wanted
};

MBM_PER_ISA(void, linear_distillation_loss, (const LinearDistillation& args, int num_threads))

}  // namespace mbm
