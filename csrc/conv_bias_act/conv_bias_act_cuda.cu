#include "common/gpu/on_device.h"
#include "conv_bias_act/conv_bias_act_cuda.h"
#include "conv_bias_act/cuda_plan.h"

namespace mbm {
namespace {

using conv::launch;

template <class T, int TAPS>
auto depthwise_kernel(int stride) {
  return stride == 1 ? conv::conv_depthwise_fwd_kernel<T, TAPS, 1>
                     : conv::conv_depthwise_fwd_kernel<T, TAPS, 2>;
}

// Whether matrix instructions do it.
template <class T>
bool takes_mma(const ConvCudaForward& args) {
  const auto& s = args.sizes;
  if (sizeof(T) != 2 || s.R != conv::kMmaTaps || s.S != conv::kMmaTaps || s.stride_y != 1)
    return false;
  const bool pools = s.pool_y == 2 && s.pool_x == 2 && s.pool_stride_y == 2 &&
                     s.pool_stride_x == 2 && s.pool_top == 0 && s.pool_left == 0;
  const bool activates = s.activation == Activation::kNone || s.activation == Activation::kRelu;
  return pools && activates && args.residual.data == nullptr && s.K % 8 == 0;
}

template <class T, int SAVES>
cudaError_t launch_mma(const ConvCudaForward& args, const gpu::Device& device,
                       cudaStream_t stream) {
  const conv::Plan plan = conv::plan_mma(args.sizes, device);
  const int64_t tiles = args.sizes.B * plan.tile.down * plan.tile.across;
  const int step = static_cast<int>(plan.blocks / plan.tile.blocks_k);
  const auto& y = args.y;
  const bool last = y.c == 1 && (y.b | y.y | y.x) % 8 == 0 &&
                    reinterpret_cast<uintptr_t>(y.data) % sizeof(uint4) == 0;
  const auto kernel = last ? conv::conv_stem_mma_fwd_kernel<T, SAVES, 1>
                           : conv::conv_stem_mma_fwd_kernel<T, SAVES, 0>;
  return launch(kernel, plan, stream, args, plan.tile, tiles, step);
}

template <class T>
cudaError_t launch_stem(const ConvCudaForward& args, const gpu::Device& device,
                        cudaStream_t stream) {
  if constexpr (sizeof(T) == 2)
    if (takes_mma<T>(args))
      return args.saved.places == nullptr ? launch_mma<T, 0>(args, device, stream)
                                          : launch_mma<T, 1>(args, device, stream);
  const conv::Plan plan = conv::plan_stem(args.sizes, args.y.c == 1);
  return launch(conv::conv_stem_fwd_kernel<T>, plan, stream, args, plan.tile);
}

template <class T>
cudaError_t launch_fwd(const ConvCudaForward& args, const gpu::Device& device,
                       cudaStream_t stream) {
  const auto& s = args.sizes;
  if (!s.depthwise) return launch_stem<T>(args, device, stream);
  const conv::Plan plan = conv::plan_depthwise(s, args.y.c == 1);
  const auto kernel = s.R == 3   ? depthwise_kernel<T, 3>(s.stride_y)
                      : s.R == 5 ? depthwise_kernel<T, 5>(s.stride_y)
                                 : depthwise_kernel<T, 7>(s.stride_y);
  return launch(kernel, plan, stream, args, plan.tile);
}

}  // namespace

bool conv_cuda_takes(const ConvCudaSizes& s) {
  const int pool = s.pool_y * s.pool_x;
  if (s.top < 0 || s.left < 0 || s.R > kConvCudaMostTaps || s.S > kConvCudaMostTaps) return false;
  if (s.stride_y != s.stride_x || s.stride_y > kConvCudaMostStride) return false;
  if (s.depthwise)
    return s.K == s.C && s.R == s.S && s.R % 2 == 1 && s.R > 1 &&
           pool <= kConvCudaMostDepthwisePool;
  return s.C <= kConvCudaMostChannels && pool <= kConvCudaMostPool;
}

cudaError_t conv_cuda_fwd(const ConvCudaForward& args, int device, cudaStream_t stream) {
  if (!conv_cuda_takes(args.sizes)) return cudaErrorInvalidValue;
  if (args.sizes.B == 0) return cudaSuccess;
  return gpu::on_device(device, args.sizes.dtype, [&](const gpu::Device& found, auto zero) {
    return launch_fwd<decltype(zero)>(args, found, stream);
  });
}

}  // namespace mbm
