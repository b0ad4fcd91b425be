#include <limits>

#include "common/gpu/on_device.h"
#include "gru/cluster_forward.cuh"
#include "gru/cuda_shapes.h"
#include "gru/gru_cuda.h"

namespace mbm {

int64_t gru_cuda_most_units(gpu::Dtype dtype) { return dtype == gpu::Dtype::kFloat32 ? 512 : 768; }

// The least time: turns of the clusters that run at once, times a step, of which the exchange and
// the barriers take about as long as the products of 27 units.
cudaError_t gru_cuda_cluster(const GruCudaSizes& given, int device, int* found) {
  *found = 0;
  return gpu::on_device(device, given.dtype, [&](const gpu::Device& on, auto zero) {
    using T = decltype(zero);
    int64_t least = std::numeric_limits<int64_t>::max();
    GruCudaSizes sizes = given;
    for (int cluster : gru::kClusters) {
      if (cluster > on.widest_cluster()) continue;
      sizes.cluster = cluster;
      gru::with_shape<T>(sizes.H, cluster, [&](auto units, auto blocks) {
        int active = 0;
        const cudaError_t error = gpu::active_clusters(
            gru::gru_fwd_kernel<T, units, blocks>,
            gru::launch_of<gru::ForwardShape<T, units, blocks>>(sizes), &active);
        if (error != cudaSuccess || active == 0) return error;
        const int64_t cost = gpu::ceil_div(gru::clusters_of(sizes), active) * (27 + units / blocks);
        if (cost < least) least = cost, *found = cluster;
        return cudaSuccess;
      });
    }
    return cudaSuccess;
  });
}

cudaError_t gru_cuda_fwd(const GruCudaForward& args, int device, cudaStream_t stream) {
  const GruCudaSizes& sizes = args.sizes;
  if (sizes.B == 0 || sizes.H == 0) return cudaSuccess;
  return gpu::on_device(device, sizes.dtype, [&](const gpu::Device&, auto zero) {
    using T = decltype(zero);
    return gru::with_shape<T>(sizes.H, sizes.cluster, [&](auto units, auto blocks) {
      return gpu::launch(gru::gru_fwd_kernel<T, units, blocks>,
                         gru::launch_of<gru::ForwardShape<T, units, blocks>>(sizes), stream, args);
    });
  });
}

}  // namespace mbm
