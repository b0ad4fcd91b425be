// Additive attention on a CUDA device; the maths is in
// mbm_kernels/ops/additive_attention/README.md. All pointers but those of the argument blocks are
// device memory; launches are asynchronous on `stream` of `device`, allocate nothing and read no
// tensor on the host.
#pragma once

#include <cstdint>

#include "common/gpu/runtime.h"

namespace mbm {

struct AdditiveAttentionCudaInputs {
  int64_t B, T, S, D, E;
  gpu::Dtype dtype;   // of query, key, value and v, and of every result that is not float32
  const void* query;  // [B, T, D], [B, S, D] and [B, S, E]: strides in elements, the last is 1
  int64_t query_b, query_t;
  const void* key;
  int64_t key_b, key_s;
  const void* value;
  int64_t value_b, value_s;
  const void* v;               // [D]
  const int64_t* key_lengths;  // [B] or null; values outside 0..S count as the nearer of the two
  const uint8_t* mask;         // [B, T, S] by strides, or null; 0 hides
  int64_t mask_b, mask_t, mask_s;
};

struct AdditiveAttentionCudaForward {
  AdditiveAttentionCudaInputs in;
  void* context;  // [B, T, E]
  void* weights;  // [B, T, S]
};

// What calls with one key share.
struct AdditiveAttentionCudaKeys {
  int64_t B, S, D;
  gpu::Dtype dtype;  // of key
  const void* key;   // [B, S, D]: strides in elements, the last is 1
  int64_t key_b, key_s;
  float* powers;      // [B, S, additive_attention_cuda_pitch(D)]: e^2k, 1 past D
  float* magnitudes;  // [B, S]: the largest |k|, infinite with a NaN
};

struct AdditiveAttentionCudaDecode {
  AdditiveAttentionCudaInputs in;  // T up to kAdditiveAttentionCudaDecodeT
  const float* powers;             // of in.key
  const float* magnitudes;
  void* context;  // [B, T, E]
  void* weights;  // [B, T, S]
};

struct AdditiveAttentionCudaBackward {
  AdditiveAttentionCudaInputs in;
  const void* weights;       // [B, T, S] of the forward
  const void* grad_context;  // [B, T, E], last stride 1, or null
  int64_t grad_context_b, grad_context_t;
  const void* grad_weights;  // [B, T, S], last stride 1, or null
  int64_t grad_weights_b, grad_weights_t;
  float* grad_scores;      // scratch, [B, S, additive_attention_cuda_rows(T)]
  float* grad_key_totals;  // scratch, [B, S, D], or null where rows(T) is one chunk
  void* grad_query;        // [B, T, D]
  void* grad_key;          // [B, S, D]
  float* grad_v;           // [B, D]: the share of each batch element
};

// Positions whose scores fit into a block's shared memory whatever T is.
constexpr int64_t kAdditiveAttentionCudaMostS = 4096;
// Queries of a step of decoding.
constexpr int64_t kAdditiveAttentionCudaDecodeT = 8;

// D rounded up to whole vectors.
int64_t additive_attention_cuda_pitch(int64_t D);

// T rounded up to whole chunks of queries, and the queries of a chunk.
int64_t additive_attention_cuda_rows(int64_t T);
int64_t additive_attention_cuda_chunk(int64_t T);

// Return cudaErrorInvalidValue for sizes that no kernel takes.
cudaError_t additive_attention_cuda_fwd(const AdditiveAttentionCudaForward& args, int device,
                                        cudaStream_t stream);
cudaError_t additive_attention_cuda_keys(const AdditiveAttentionCudaKeys& args, int device,
                                         cudaStream_t stream);
// The forward of a few queries, given what the kernel above made of the key.
cudaError_t additive_attention_cuda_decode(const AdditiveAttentionCudaDecode& args, int device,
                                           cudaStream_t stream);
// Not of value, whose gradient is a product of weights and grad_context alone.
cudaError_t additive_attention_cuda_bwd(const AdditiveAttentionCudaBackward& args, int device,
                                        cudaStream_t stream);

}  // namespace mbm
