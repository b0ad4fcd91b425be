#include "common/gpu/on_device.h"
#include "conv_bias_act/conv_bias_act_cuda.h"
#include "conv_bias_act/cuda_plan.h"

namespace mbm {
namespace {

using conv::launch;

template <class T>
cudaError_t launch_grad_weight(const ConvCudaBackward& args, cudaStream_t stream) {
  const auto& s = args.sizes;
  conv::Plan plan = conv::plan_grad_weight(s);
  const int parts = static_cast<int>(conv::parts_of(s, plan));
  plan.blocks = int64_t{parts} * plan.tile.blocks_k;
  cudaError_t error;
  if (s.depthwise) {
    const auto kernel = s.R == 3   ? conv::conv_depthwise_grad_weight_kernel<T, 3>
                        : s.R == 5 ? conv::conv_depthwise_grad_weight_kernel<T, 5>
                                   : conv::conv_depthwise_grad_weight_kernel<T, 7>;
    error = launch(kernel, plan, stream, args, plan.tile, parts);
  } else {
    const auto split = conv::StemSplit::of(s.terms);
    plan.blocks *= split.chunks;
    error =
        launch(conv::conv_stem_grad_weight_kernel<T>, plan, stream, args, plan.tile, split, parts);
  }
  if (error != cudaSuccess) return error;
  conv::Plan sum;
  sum.blocks = conv::ceil_div(int64_t{s.K} * (s.terms + 1), conv::kThreads);
  return launch(conv::conv_sum_parts_kernel<T>, sum, stream, args, parts);
}

template <class T>
cudaError_t launch_bwd(const ConvCudaBackward& args, cudaStream_t stream) {
  const auto& s = args.sizes;
  cudaError_t error = cudaSuccess;
  if (args.grad_z.data != nullptr) {
    const conv::Plan plan = conv::plan_grad_z(s);
    error = launch(conv::conv_grad_z_kernel<T>, plan, stream, args, plan.tile);
  }
  if (error == cudaSuccess && args.grad_x.data != nullptr) {
    const conv::Plan plan = conv::plan_grad_x(s, args.grad_y.c == 1);
    const auto kernel =
        s.depthwise ? conv::conv_depthwise_grad_x_kernel<T> : conv::conv_stem_grad_x_kernel<T>;
    error = launch(kernel, plan, stream, args, plan.tile);
  }
  if (error == cudaSuccess && args.parts != nullptr) error = launch_grad_weight<T>(args, stream);
  return error;
}

}  // namespace

int64_t conv_cuda_parts(const ConvCudaSizes& s) {
  return conv::parts_of(s, conv::plan_grad_weight(s)) * s.K * (s.terms + 1);
}

cudaError_t conv_cuda_bwd(const ConvCudaBackward& args, int device, cudaStream_t stream) {
  if (!conv_cuda_takes(args.sizes) || args.sizes.B == 0) return cudaErrorInvalidValue;
  if (args.sizes.x_bytes && args.grad_x.data != nullptr) return cudaErrorInvalidValue;
  return gpu::on_device(device, args.sizes.dtype, [&](const gpu::Device&, auto zero) {
    return launch_bwd<decltype(zero)>(args, stream);
  });
}

}  // namespace mbm
