// Contrastive losses of B matching pairs, with their gradients in the same call where wanted.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

enum class ContrastiveKind { kInfoNce = 0, kSigLip = 1 };

// All arrays are contiguous and overlap nowhere. A logit is scale times a product, plus bias.
struct ContrastiveLoss {
  int64_t B, D;
  ContrastiveKind kind;
  const float* image;      // [B, D]
  const float* text;       // [B, D]
  const float* scale;      // [1]
  const float* bias;       // [1], or null: 0; kInfoNce does not depend on it
  const float* grad_loss;  // [1]; null: 1
  float* loss;             // [1], written; null: not wanted
  float* grad_image;       // [B, D], written; null: not wanted
  float* grad_text;        // [B, D], written; null: not wanted
  float* grad_scale;       // [1], written; null: not wanted
  float* grad_bias;        // [1], written; null: not wanted
};

MBM_PER_ISA(void, contrastive_loss, (const ContrastiveLoss& args, int num_threads))

}  // namespace mbm
