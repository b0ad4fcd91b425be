#include "common/gpu/on_device.h"
#include "gru/cuda_shapes.h"
#include "gru/group_backward.cuh"
#include "gru/gru_cuda.h"

namespace mbm::gru {

cudaError_t group_bwd_blocks(const GruCudaSizes& sizes, const gpu::Device& on, GroupBlocks* found) {
  return with_factors(sizes, [&](auto zero) {
    using T = decltype(zero);
    return with_group_units<T>(sizes.H, [&](auto units) {
      found->units = units;
      found->needed = units / kGroupUnits;
      return gpu::active_blocks(gru_group_bwd_kernel<T, units>,
                                group_launch_of<BackwardGroup<T, units>>(sizes, found->needed), on,
                                &found->resident);
    });
  });
}

cudaError_t group_bwd(const GruCudaBackward& args, cudaStream_t stream) {
  const GruCudaSizes& sizes = args.sizes;
  return with_factors(sizes, [&](auto zero) {
    using T = decltype(zero);
    return with_group_units<T>(sizes.H, [&](auto units) {
      return in_turns(sizes, [&](int first_direction) {
        return gpu::launch(gru_group_bwd_kernel<T, units>,
                           group_launch_of<BackwardGroup<T, units>>(sizes, units / kGroupUnits),
                           stream, args, first_direction);
      });
    });
  });
}

}  // namespace mbm::gru
