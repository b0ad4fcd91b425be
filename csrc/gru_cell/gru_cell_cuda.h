// One step of a GRU on a CUDA device; the maths is in mbm_kernels/ops/gru_cell/README.md. Pointers
// are device memory, contiguous and row-major unless a stride is given; launches are asynchronous
// on `stream` of `device` and allocate nothing. B rows, C inputs, H units; gates r, z, n.
#pragma once

#include <cstdint>

#include "common/gpu/runtime.h"

namespace mbm {

struct GruCellCudaForward {
  int64_t B, C, H;
  gpu::Dtype dtype;
  const void* x;  // [B, C], [B, H]: strides of the rows in elements, the last is 1
  int64_t x_b;
  const void* h;
  int64_t h_b;
  const void* w_ih;  // [3H, C]
  const void* w_hh;  // [3H, H]
  const void* b_ih;  // [3H] or null
  const void* b_hh;  // [3H] or null
  void* h_new;       // [B, H]
  void* reserve;     // [B, 4H] = r, z, n, W_hn h + b_hn, or null
};

struct GruCellCudaBackward {
  int64_t B, H;
  gpu::Dtype dtype;
  const void* grad_h_new;  // [B, H], [B, H]: strides of the rows, the last is 1
  int64_t grad_b;
  const void* h;
  int64_t h_b;
  const void* reserve;  // of the forward
  void* gates;          // [B, 4H]: gradients n, r, z and r n
  void* direct;         // [B, H]: of h but for W_hh's part, or null
};

cudaError_t gru_cell_cuda_fwd(const GruCellCudaForward& args, int device, cudaStream_t stream);
// Of the gates; products with them give the other gradients.
cudaError_t gru_cell_cuda_bwd(const GruCellCudaBackward& args, int device, cudaStream_t stream);

}  // namespace mbm
