// Which kernels there are: units that the registers of a cluster or of a group of blocks hold, and
// blocks of a cluster.
#pragma once

#include <type_traits>

#include "common/gpu/on_device.h"
#include "gru/gru_cuda.h"

namespace mbm::gru {

constexpr int kClusters[] = {16, 8, 4};

template <int N>
using Constant = std::integral_constant<int, N>;

// visit(a zero of the type that products take).
template <class Visit>
cudaError_t with_factors(const GruCudaSizes& sizes, const Visit& visit) {
  if (sizes.tf32 && sizes.dtype == gpu::Dtype::kFloat32) return visit(gpu::tf32{});
  return gpu::with_dtype(sizes.dtype, visit);
}

// The least that holds H, 0 where none does.
inline int held_units(int64_t H) {
  for (int units : {64, 128, 256, 512, 768})
    if (H <= units) return units;
  return 0;
}

// visit(units, cluster) as constants, where there is such a kernel for T.
template <class T, class Visit>
cudaError_t with_shape(int64_t H, int cluster, const Visit& visit) {
  constexpr bool kWide = sizeof(T) == 4;
  switch (held_units(H) * 100 + cluster) {
    case 6404: return visit(Constant<64>{}, Constant<4>{});
    case 12804: return visit(Constant<128>{}, Constant<4>{});
    case 25608: return visit(Constant<256>{}, Constant<8>{});
    case 51216: return visit(Constant<512>{}, Constant<16>{});
  }
  if constexpr (!kWide) {
    switch (held_units(H) * 100 + cluster) {
      case 25604: return visit(Constant<256>{}, Constant<4>{});
      case 51208: return visit(Constant<512>{}, Constant<8>{});
      case 76816: return visit(Constant<768>{}, Constant<16>{});
    }
  }
  return cudaErrorInvalidValue;
}

// visit(units) as a constant, where a group has such a kernel for T.
template <class T, class Visit>
cudaError_t with_group_units(int64_t H, const Visit& visit) {
  if (H <= 64) return visit(Constant<64>{});
  if (H <= 128) return visit(Constant<128>{});
  if (H <= 256) return visit(Constant<256>{});
  if (H <= 512) return visit(Constant<512>{});
  if (H <= 768) return visit(Constant<768>{});
  if (H <= 1024) return visit(Constant<1024>{});
  if constexpr (sizeof(T) == 2) {
    if (H <= 1536) return visit(Constant<1536>{});
    if (H <= 2048) return visit(Constant<2048>{});
  }
  return cudaErrorInvalidValue;
}

inline int64_t tiles_of(const GruCudaSizes& sizes) { return gpu::ceil_div(sizes.B, 8); }

// Clusters of 8 rows each.
inline int64_t clusters_of(const GruCudaSizes& sizes) { return sizes.directions * tiles_of(sizes); }

template <class Exchange>
gpu::Launch launch_of(const GruCudaSizes& sizes) {
  return {clusters_of(sizes) * sizes.cluster, sizes.cluster, Exchange::kThreads, Exchange::kBytes};
}

template <class Exchange>
gpu::Launch group_launch_of(const GruCudaSizes& sizes, int blocks) {
  return {int64_t{sizes.at_once} * sizes.groups * blocks, 1, Exchange::kThreads, Exchange::kBytes,
          true};
}

// launch(first of the directions that run at once), for all of them.
template <class Launch>
cudaError_t in_turns(const GruCudaSizes& sizes, const Launch& launch) {
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < sizes.directions && error == cudaSuccess; first += sizes.at_once)
    error = launch(first);
  return error;
}

// Of gru_groups_cuda.cu and gru_groups_backward_cuda.cu, with the device the current one.
// Units that a group holds, its blocks, and the blocks that run at once.
struct GroupBlocks {
  int units, needed, resident;
};
cudaError_t group_fwd_blocks(const GruCudaSizes& sizes, const gpu::Device& on, GroupBlocks* found);
cudaError_t group_bwd_blocks(const GruCudaSizes& sizes, const gpu::Device& on, GroupBlocks* found);
cudaError_t group_fwd(const GruCudaForward& args, cudaStream_t stream);
cudaError_t group_bwd(const GruCudaBackward& args, cudaStream_t stream);

}  // namespace mbm::gru
