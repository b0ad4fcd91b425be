// A GRU over a sequence on a CUDA device with thread-block clusters; the maths is in
// mbm_kernels/ops/gru/README.md. Pointers are device memory, contiguous and row-major unless
// strides are given; launches are asynchronous on `stream` of `device` and allocate nothing. T
// steps, B rows, H units; gates r, z, n. Directions run at once, each by its own arrays.
#pragma once

#include <cstdint>

#include "common/gpu/runtime.h"

namespace mbm {

constexpr int kGruCudaDirections = 2;  // at most

struct GruCudaSizes {
  int64_t T, B, H;
  gpu::Dtype dtype;
  int directions;
  int cluster;             // blocks that share a row's units, from gru_cuda_cluster
  const int64_t* lengths;  // [B] or null; values outside 0..T count as the nearer of the two
  int64_t y_t, y_b;        // strides of y [T, B, H], in elements
};

struct GruCudaForward {
  struct Direction {
    bool reverse;
    const void* inputs;  // [T, B, 3H]: W_ih x + b_ih
    const void* w_hh;    // [3H, H]
    const void* b_hh;    // [3H] or null
    const void* h0;      // [B, H] or null
    void* y;             // zeros where there are lengths
    void* h_n;           // [B, H]
    void* reserve;       // [T, B, 4H] = r, z, n, W_hn h + b_hn, or null; zeros where lengths
  };
  GruCudaSizes sizes;
  Direction direction[kGruCudaDirections];
};

struct GruCudaBackward {
  struct Direction {
    bool reverse;
    const void* grad_y;  // as y but for its strides, or null
    int64_t grad_y_t, grad_y_b;
    const void* w_hh_transposed;  // [H, 3H]
    const void* y;                // of the forward
    const void* h0;               // [B, H] or null
    const void* reserve;
    float* carried;  // [B, H]: the gradient of h_n in, of h0 out
    void* gates;     // [T, B, 4H]: gradients n, r, z and r n; zeros where there are lengths
  };
  GruCudaSizes sizes;
  Direction direction[kGruCudaDirections];
};

// Units that a cluster's registers hold W_hh of.
int64_t gru_cuda_most_units(gpu::Dtype dtype);

// The cluster that ends first on this device, 0 where it has none or H is too large.
cudaError_t gru_cuda_cluster(const GruCudaSizes& sizes, int device, int* found);

// Return cudaErrorInvalidValue for sizes or clusters that no kernel takes.
cudaError_t gru_cuda_fwd(const GruCudaForward& args, int device, cudaStream_t stream);
cudaError_t gru_cuda_bwd(const GruCudaBackward& args, int device, cudaStream_t stream);

}  // namespace mbm
