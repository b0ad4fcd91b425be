// Cross-entropy of projected rows, with its gradients in the same pass where they are wanted.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

enum class RowReduction { kNone = 0, kMean = 1, kSum = 2 };

// All arrays are contiguous and overlap nowhere. Rows whose target is ignore_index are not
// computed and nothing of them is read: not their hidden states, not their grad_loss. A row whose
// target is neither that nor a class has loss NaN and gradients NaN; in the sums over rows these
// make all NaN.
struct LinearCrossEntropy {
  int64_t N, H, V;
  const float* hidden;    // [N, H]
  const float* weight;    // [V, H]
  const float* bias;      // [V], or null: 0
  const int64_t* target;  // [N], ignore_index or 0 <= target < V, any other: NaN
  int64_t ignore_index;
  float label_smoothing, softcap, z_loss;  // softcap 0: none
  RowReduction reduction;
  const float* grad_loss;  // as loss; null: 1
  float* loss;             // [N] for kNone, else [1]; written unless null
  float* grad_hidden;      // [N, H], written; null: not wanted
  float* grad_weight;      // [V, H], written; null: not wanted
  float* grad_bias;        // [V], written; null: not wanted
};

MBM_PER_ISA(void, linear_cross_entropy, (const LinearCrossEntropy& args, int num_threads))

}  // namespace mbm
