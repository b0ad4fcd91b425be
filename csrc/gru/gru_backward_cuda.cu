#include "common/gpu/on_device.h"
#include "gru/cluster_backward.cuh"
#include "gru/cuda_shapes.h"
#include "gru/gru_cuda.h"

namespace mbm {

cudaError_t gru_cuda_bwd(const GruCudaBackward& args, int device, cudaStream_t stream) {
  const GruCudaSizes& sizes = args.sizes;
  if (sizes.B == 0 || sizes.H == 0) return cudaSuccess;
  return gpu::on_device(device, [&](const gpu::Device&) {
    if (sizes.cluster == 0) return gru::group_bwd(args, stream);
    return gru::with_factors(sizes, [&](auto zero) {
      using T = decltype(zero);
      return gru::with_shape<T>(sizes.H, sizes.cluster, [&](auto units, auto blocks) {
        return gpu::launch(gru::gru_bwd_kernel<T, units, blocks>,
                           gru::launch_of<gru::BackwardCluster<T, units, blocks>>(sizes), stream,
                           args);
      });
    });
  });
}

}  // namespace mbm
