#include <algorithm>
#include <limits>

#include "common/gpu/on_device.h"
#include "gru/cluster_forward.cuh"
#include "gru/cuda_shapes.h"
#include "gru/gru_cuda.h"

namespace mbm {
namespace {

// The cluster with the least time: turns of the clusters that run at once, times a step, of which
// the exchange and the barriers take about as long as the products of 27 units. 0 without one.
template <class T>
int find_cluster(GruCudaSizes sizes, const gpu::Device& on) {
  int found = 0;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int cluster : gru::kClusters) {
    if (cluster > on.widest_cluster()) continue;
    sizes.cluster = cluster;
    gru::with_shape<T>(sizes.H, cluster, [&](auto units, auto blocks) {
      int active = 0;
      const cudaError_t error = gpu::active_clusters(
          gru::gru_fwd_kernel<T, units, blocks>,
          gru::launch_of<gru::ForwardCluster<T, units, blocks>>(sizes), &active);
      if (error != cudaSuccess || active == 0) return error;
      const int64_t cost = gpu::ceil_div(gru::clusters_of(sizes), active) * (27 + units / blocks);
      if (cost < least) least = cost, found = cluster;
      return cudaSuccess;
    });
  }
  return found;
}

// Groups of one tile each where all of them run at once; where not even one of each direction
// does, the directions take turns.
cudaError_t find_groups(const GruCudaSizes& sizes, const gpu::Device& on, GruCudaPlan* found) {
  gru::GroupBlocks forward{}, backward{};
  cudaError_t error = gru::group_fwd_blocks(sizes, on, &forward);
  if (error == cudaSuccess) error = gru::group_bwd_blocks(sizes, on, &backward);
  if (error != cudaSuccess) return error;
  found->needed = forward.needed;
  found->resident = std::min(forward.resident, backward.resident);
  const int64_t fit = found->resident / found->needed;
  if (fit == 0) return cudaSuccess;
  found->at_once = fit < sizes.directions ? 1 : sizes.directions;
  const int64_t tiles = gru::tiles_of(sizes), width = forward.units;
  if ((sizes.T + 2) * tiles > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  found->groups = static_cast<int>(std::min(tiles, fit / found->at_once));
  found->flags = sizes.directions * found->groups * gru_cuda_group_flags(found->needed);
  found->states = sizes.directions * tiles * gru_cuda_tile_states(width);
  found->backward_states = 3 * found->states;
  return cudaSuccess;
}

}  // namespace

int64_t gru_cuda_most_units(gpu::Dtype dtype) {
  return dtype == gpu::Dtype::kFloat32 ? 1024 : 2048;
}

cudaError_t gru_cuda_plan(const GruCudaSizes& sizes, int device, GruCudaPlan* found) {
  *found = {};
  return gpu::on_device(device, [&](const gpu::Device& on) {
    const cudaError_t error = gru::with_factors(sizes, [&](auto zero) {
      found->cluster = find_cluster<decltype(zero)>(sizes, on);
      return cudaSuccess;
    });
    if (error != cudaSuccess || found->cluster != 0) return error;
    return find_groups(sizes, on, found);
  });
}

cudaError_t gru_cuda_fwd(const GruCudaForward& args, int device, cudaStream_t stream) {
  const GruCudaSizes& sizes = args.sizes;
  if (sizes.B == 0 || sizes.H == 0) return cudaSuccess;
  return gpu::on_device(device, [&](const gpu::Device&) {
    if (sizes.cluster == 0) return gru::group_fwd(args, stream);
    return gru::with_factors(sizes, [&](auto zero) {
      using T = decltype(zero);
      return gru::with_shape<T>(sizes.H, sizes.cluster, [&](auto units, auto blocks) {
        return gpu::launch(gru::gru_fwd_kernel<T, units, blocks>,
                           gru::launch_of<gru::ForwardCluster<T, units, blocks>>(sizes), stream,
                           args);
      });
    });
  });
}

}  // namespace mbm
