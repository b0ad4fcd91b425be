#include "additive_attention/additive_attention_cuda.h"
#include "additive_attention/cuda_plan.h"
#include "additive_attention/decode.cuh"
#include "common/gpu/on_device.h"

namespace mbm {
namespace {

using additive::ceil_div;
using additive::DecodeTile;
using additive::ForwardMemory;

template <class T, int QUERIES>
cudaError_t launch(const AdditiveAttentionCudaDecode& args, const gpu::Device& device,
                   cudaStream_t stream) {
  const auto& in = args.in;
  const auto shared_bytes = [&](int cluster) {
    const int64_t width = ceil_div(in.S, 4 * cluster) * 4;
    return ForwardMemory<DecodeTile<QUERIES>>::floats(width * cluster, cluster) * 4;
  };
  const int cluster = additive::plan_slices(device, in.B, in.S,
                                            additive::kWarps * additive::kDecodeKeys, shared_bytes);
  if (cluster == 0) return cudaErrorInvalidValue;
  const gpu::Launch how{in.B * cluster, cluster, additive::kThreads,
                        static_cast<size_t>(shared_bytes(cluster))};
  return gpu::launch(additive::additive_attention_decode_kernel<T, QUERIES>, how, stream, args);
}

}  // namespace

int64_t additive_attention_cuda_pitch(int64_t D) { return ceil_div(D, 4) * 4; }

cudaError_t additive_attention_cuda_keys(const AdditiveAttentionCudaKeys& args, int device,
                                         cudaStream_t stream) {
  if (args.B == 0 || args.S == 0) return cudaSuccess;
  return gpu::on_device(device, args.dtype, [&](const gpu::Device&, auto zero) {
    const gpu::Launch how{ceil_div(args.B * args.S, additive::kKeyThreads / 32), 1,
                          additive::kKeyThreads, 0};
    return gpu::launch(additive::additive_attention_keys_kernel<decltype(zero)>, how, stream, args);
  });
}

cudaError_t additive_attention_cuda_decode(const AdditiveAttentionCudaDecode& args, int device,
                                           cudaStream_t stream) {
  const auto& in = args.in;
  if (in.B == 0 || in.T == 0) return cudaSuccess;
  if (in.S > kAdditiveAttentionCudaMostS || in.T > kAdditiveAttentionCudaDecodeT)
    return cudaErrorInvalidValue;
  return gpu::on_device(device, in.dtype, [&](const gpu::Device& found, auto zero) {
    using T = decltype(zero);
    if (in.T == 1) return launch<T, 1>(args, found, stream);
    if (in.T == 2) return launch<T, 2>(args, found, stream);
    return in.T <= 4 ? launch<T, 4>(args, found, stream) : launch<T, 8>(args, found, stream);
  });
}

}  // namespace mbm
