// Scaled dot-product attention with its weights on the CPU, float32, forward and backward.
// B batch, N heads, T queries, S keys, D feature, E value feature. Any size may be 0.
//
//   p[b,n,t,:] = softmax over s of scale query[b,n,t] . key[b,n,s] + added[b,n,t,s]
//   context[b,n,t] = sum_s p[b,n,t,s] value[b,n,s]
//   weights = p, or its mean over n
//
// A query with nothing to attend to has p 0. Pairs that are hidden are not read: key and value may
// hold anything there, and so may the query and gradients of a query with nothing. Strides count
// elements and may be 0 (expanded); rows of float matrices are contiguous. Inputs may alias one
// another; outputs alias nothing. All memory is the caller's and is used during the call only.
//
// Results are bitwise the same for any num_threads.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

// Row r of head n of batch element b: data + b * stride_b + n * stride_n + r * stride_r.
template <class T>
struct HeadRows {
  T* data;  // null: not given, not needed
  int64_t stride_b, stride_n, stride_r;
  T* at(int64_t b, int64_t n, int64_t r) const {
    return data + b * stride_b + n * stride_n + r * stride_r;
  }
};

struct CrossAttentionInputs {
  int64_t B, N, T, S, D, E;
  float scale;
  HeadRows<const float> query;   // [B, N, T, D]
  HeadRows<const float> key;     // [B, N, S, D]
  HeadRows<const float> value;   // [B, N, S, E]
  const int64_t* key_lengths;    // [B], values outside 0..S are clamped; null: every key
  HeadRows<const uint8_t> mask;  // [B, N, T, S], nonzero = attend
  HeadRows<const float> added;   // [B, N, T, S], -infinity hides; at most one of the two masks
  int64_t mask_stride_s;         // of either mask, whose rows need not be contiguous
};

struct CrossAttentionForward {
  CrossAttentionInputs in;
  HeadRows<float> context;  // [B, N, T, E], written
  float* mean;              // [B, T, S] contiguous, written; null: not wanted
  float* heads;             // [B, N, T, S] contiguous, written: p; null: not wanted
};

struct CrossAttentionBackward {
  CrossAttentionInputs in;
  const float* heads;                  // [B, N, T, S] contiguous: p; null: computed again
  HeadRows<const float> grad_context;  // [B, N, T, E] or null: zero
  HeadRows<const float> grad_weights;  // of p, [B, N, T, S], or null: zero
  float grad_weights_scale;            // times grad_weights: 1 / N where the mean was returned
  HeadRows<float> grad_query;          // [B, N, T, D], written
  HeadRows<float> grad_key;            // [B, N, S, D], written
  HeadRows<float> grad_value;          // [B, N, S, E], written
  float* grad_added;                   // [B, N, T, S] contiguous, written; null: not needed
};

MBM_PER_ISA(void, cross_attention_fwd, (const CrossAttentionForward& args, int num_threads))
MBM_PER_ISA(void, cross_attention_bwd, (const CrossAttentionBackward& args, int num_threads))

}  // namespace mbm
