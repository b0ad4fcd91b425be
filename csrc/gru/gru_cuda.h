// A GRU over a sequence on a CUDA device, over thread-block clusters or groups of blocks that meet
// in global memory; the maths is in mbm_kernels/ops/gru/README.md. Pointers are device memory,
// contiguous and row-major unless strides are given; launches are asynchronous on `stream` of
// `device` and allocate nothing. T steps, B rows, H units; gates r, z, n. Directions run at once,
// each by its own arrays.
#pragma once

#include <cstdint>

#include "common/gpu/runtime.h"

namespace mbm {

constexpr int kGruCudaDirections = 2;  // at most

struct GruCudaSizes {
  int64_t T, B, H;
  gpu::Dtype dtype;
  bool tf32;  // products of float32 by tf32
  int directions;
  int cluster;             // blocks that share a row's units, or 0: groups; from gru_cuda_plan,
  int groups;              // of each direction, as all below; without clusters alone
  int at_once;             // directions that a launch takes
  const int64_t* lengths;  // [B] or null; values outside 0..T count as the nearer of the two
  int64_t y_t, y_b;        // strides of y [T, B, H], in elements
};

// What the blocks of groups pass to one another; null with clusters. Its counts are a plan's.
struct GruCudaThrough {
  uint32_t* flags;  // zeros
  void* states;     // on 16 bytes, of the dtype
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
    float* carried;      // [B, H], for groups: their own
  };
  GruCudaSizes sizes;
  GruCudaThrough through;
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
  GruCudaThrough through;
  Direction direction[kGruCudaDirections];
};

// Elements of a tile of 8 rows, in two buffers; `width` of the vectors of a row.
constexpr int64_t gru_cuda_tile_states(int64_t width) { return 2 * 8 * width; }
// Of a group, so that no other's are in a cache line with them.
constexpr int64_t gru_cuda_group_flags(int64_t blocks) { return (blocks + 31) / 32 * 32; }

// How sizes run on a device: by clusters where they can, else by groups, else not.
struct GruCudaPlan {
  int cluster, groups, at_once;  // 0, 0 where nothing runs
  int needed, resident;          // blocks of a group; blocks that the device runs at once
  int64_t flags;                 // elements, as those below: of GruCudaThrough
  int64_t states, backward_states;
};
cudaError_t gru_cuda_plan(const GruCudaSizes& sizes, int device, GruCudaPlan* found);

// Units that a group of blocks holds W_hh of; a cluster holds 768, 512 in float32.
int64_t gru_cuda_most_units(gpu::Dtype dtype);

// Return cudaErrorInvalidValue for sizes or plans that no kernel takes.
cudaError_t gru_cuda_fwd(const GruCudaForward& args, int device, cudaStream_t stream);
cudaError_t gru_cuda_bwd(const GruCudaBackward& args, int device, cudaStream_t stream);

}  // namespace mbm
