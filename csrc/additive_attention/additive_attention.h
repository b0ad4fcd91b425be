// Additive attention on the CPU, float32, forward and backward.
// B batch, T queries, S keys, D feature, E value feature. Any size may be 0.
//
//   weights[b,t,:] = softmax over s of sum_d v[d] tanh(query[b,t,d] + key[b,s,d])
//   context[b,t,:] = sum_s weights[b,t,s] value[b,s,:]
//
// Pairs that are hidden are not read: key and value may hold anything there, and so may the query
// and gradients of a query with nothing to attend to.
//
// Strides count elements and may be 0 (expanded); the innermost dimension of every float tensor is
// contiguous. Inputs may alias one another; outputs alias nothing. All memory is the caller's and
// is used during the call only. [B,T,S,D] never exists: the largest buffer is [B,T,S] (backward).
//
// Results are bitwise the same for any num_threads: each element is summed in an order that the
// sizes alone decide.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

struct AdditiveAttentionInputs {
  int64_t B, T, S, D, E;
  const float* query;  // [B, T, D]
  int64_t query_stride_b, query_stride_t;
  const float* key;  // [B, S, D]
  int64_t key_stride_b, key_stride_s;
  const float* value;  // [B, S, E]
  int64_t value_stride_b, value_stride_s;
  const float* v;              // [D]
  const int64_t* key_lengths;  // [B], values outside 0..S are clamped; null: every key
  const uint8_t* mask;         // [B, T, S] through the strides, nonzero = attend; or null
  int64_t mask_stride_b, mask_stride_t, mask_stride_s;
};

struct AdditiveAttentionForward {
  AdditiveAttentionInputs in;
  const float* packed_key;  // what additive_attention_pack_key() made of in.key, or null
  float* context;           // [B, T, E] contiguous, written
  float* weights;           // [B, T, S] contiguous, written; holds the scores on the way
};

struct AdditiveAttentionBackward {
  AdditiveAttentionInputs in;
  const float* weights;       // [B, T, S] contiguous, from the forward
  const float* grad_context;  // [B, T, E] or null: zero
  int64_t grad_context_stride_b, grad_context_stride_t;
  const float* grad_weights;  // [B, T, S] or null: zero
  int64_t grad_weights_stride_b, grad_weights_stride_t;
  float* grad_query;  // [B, T, D] contiguous, written; null: not needed
  float* grad_key;    // [B, S, D] contiguous, written; null: not needed
  float* grad_value;  // [B, S, E] contiguous, written; null: not needed
  float* grad_v;      // [D], written; null: not needed
};

// The keys' exponentials for several forwards with one key: S rounded up to tiles, D to two
// vectors.
MBM_PER_ISA(int64_t, additive_attention_packed_key_size, (int64_t B, int64_t S, int64_t D))
// Reads B, S, D and the key of `in`; out has additive_attention_packed_key_size(B, S, D) floats.
MBM_PER_ISA(void, additive_attention_pack_key,
            (const AdditiveAttentionInputs& in, float* out, int num_threads))
MBM_PER_ISA(void, additive_attention_fwd, (const AdditiveAttentionForward& args, int num_threads))
MBM_PER_ISA(void, additive_attention_bwd, (const AdditiveAttentionBackward& args, int num_threads))

}  // namespace mbm
