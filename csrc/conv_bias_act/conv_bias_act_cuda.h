// Convolution and its epilogue on a CUDA device, for few input channels (one group) and depthwise
// (as many groups as channels in and out); the maths is in mbm_kernels/ops/conv_bias_act/README.md.
// Pointers are device memory of `dtype` unless said otherwise; launches are asynchronous on
// `stream` of `device` and allocate nothing. Results depend on the sizes alone, to the bit.
#pragma once

#include <cstdint>

#include "common/gpu/runtime.h"
#include "conv_bias_act/activation.h"

namespace mbm {

constexpr int kConvCudaMostChannels = 4;  // into the products of one group
constexpr int kConvCudaMostTaps = 7;      // a side of the kernel
constexpr int kConvCudaMostStride = 2;    // of the convolution
constexpr int kConvCudaMostPool = 128;    // places of a window
constexpr int kConvCudaMostDepthwisePool = 16;

struct ConvCudaSizes {
  int64_t B;
  int C, K, Y, X, R, S;  // depthwise: K == C
  int stride_y, stride_x, top, left;
  int conv_y, conv_x, out_y, out_x;  // before and after the pool
  int pool_y, pool_x, pool_stride_y, pool_stride_x, pool_top, pool_left;  // 1, 1, 1, 1, 0, 0: none
  Activation activation;
  bool depthwise;
  gpu::Dtype dtype;
  int terms;     // of an output's sum: C R S, depthwise R S
  bool x_bytes;  // x is uint8 and taken as its values; it has no gradient
};

struct ConvCudaMap {  // null data: not there
  void* data;
  int64_t b, c, y, x;  // strides in elements
};

// What the forward leaves for the backward, each [B, Y'', X'', K] or null.
struct ConvCudaSaved {
  uint8_t* places;  // a window's first maximum in seven bits, above them f' of relu and its kin
  void* z;          // what the activation was applied to there
  gpu::Dtype z_dtype;
};

struct ConvCudaForward {
  ConvCudaSizes sizes;
  ConvCudaMap x;         // [B, C, Y, X], of bytes where sizes say so
  const void* weight;    // [K, C, R, S], depthwise [K, 1, R, S]; contiguous
  const void* bias;      // [K] or null
  ConvCudaMap residual;  // [B, K, Y', X']
  ConvCudaMap y;         // [B, K, Y'', X'']
  ConvCudaSaved saved;
};

struct ConvCudaBackward {
  ConvCudaSizes sizes;
  ConvCudaMap x;
  const void* weight;
  ConvCudaMap grad_y;
  ConvCudaSaved saved;  // places: null where z alone tells f', or without pool and activation
  // Each may be null and is then not computed; all are overwritten.
  ConvCudaMap grad_x;
  ConvCudaMap grad_z;  // [B, K, Y', X'], the residual's
  void* grad_weight;   // contiguous
  void* grad_bias;     // [K]
  float* parts;        // conv_cuda_parts() floats, where a gradient of weight or bias is wanted
};

// False where the kernels do not take these sizes; launches then return cudaErrorInvalidValue.
bool conv_cuda_takes(const ConvCudaSizes& sizes);
int64_t conv_cuda_parts(const ConvCudaSizes& sizes);
cudaError_t conv_cuda_fwd(const ConvCudaForward& args, int device, cudaStream_t stream);
cudaError_t conv_cuda_bwd(const ConvCudaBackward& args, int device, cudaStream_t stream);

}  // namespace mbm
