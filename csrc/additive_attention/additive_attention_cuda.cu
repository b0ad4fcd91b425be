#include "additive_attention/additive_attention_cuda.h"
#include "additive_attention/cuda_plan.h"
#include "additive_attention/forward.cuh"
#include "common/gpu/on_device.h"

namespace mbm {
namespace {

using additive::ceil_div;
using additive::ForwardMemory;
using additive::ScoreTile;

int64_t shared_bytes(int tile, int64_t S, int cluster) {
  const int64_t width = ceil_div(S, 4 * cluster) * 4;
  return additive::of_tile(tile, [&](auto queries) {
    return ForwardMemory<ScoreTile<queries>>::floats(width * cluster, cluster) * 4;
  });
}

int positions(int tile) { return tile == 20 ? ScoreTile<20>::kS : ScoreTile<8>::kS; }

template <class T>
cudaError_t launch(const AdditiveAttentionCudaForward& args, const gpu::Device& device,
                   cudaStream_t stream) {
  const auto& in = args.in;
  const auto plan = additive::plan_tiles(
      device, in.B, in.T, in.S, positions,
      [&](int tile, int cluster) { return shared_bytes(tile, in.S, cluster); });
  if (plan.tile == 0) return cudaErrorInvalidValue;
  const gpu::Launch how{in.B * ceil_div(in.T, plan.tile) * plan.cluster, plan.cluster,
                        additive::kThreads,
                        static_cast<size_t>(shared_bytes(plan.tile, in.S, plan.cluster))};
  const auto kernel = plan.tile == 20  ? additive::additive_attention_fwd_kernel<T, 20>
                      : plan.tile == 8 ? additive::additive_attention_fwd_kernel<T, 8>
                                       : additive::additive_attention_fwd_kernel<T, 4>;
  return gpu::launch(kernel, how, stream, args);
}

}  // namespace

cudaError_t additive_attention_cuda_fwd(const AdditiveAttentionCudaForward& args, int device,
                                        cudaStream_t stream) {
  const auto& in = args.in;
  if (in.B == 0 || in.T == 0) return cudaSuccess;
  if (in.S > kAdditiveAttentionCudaMostS) return cudaErrorInvalidValue;
  return gpu::on_device(device, in.dtype, [&](const gpu::Device& found, auto zero) {
    return launch<decltype(zero)>(args, found, stream);
  });
}

}  // namespace mbm
