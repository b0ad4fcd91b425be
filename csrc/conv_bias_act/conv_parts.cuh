// Gradients of weight and bias as shares of blocks, [part][K][terms + 1] with the bias's last, and
// their sum in one order.
#pragma once

#include "conv_bias_act/conv_spread.cuh"

namespace mbm::conv {

struct Part {
  float* data;
  int width;

  MBM_DEVICE Part(const ConvCudaBackward& args, int part)
      : data(args.parts + int64_t{part} * args.sizes.K * (args.sizes.terms + 1)),
        width(args.sizes.terms + 1) {}
  MBM_DEVICE void store(int k, int n, float sum) const { data[int64_t{k} * width + n] = sum; }
};

template <class T>
MBM_KERNEL(kThreads, 4)
conv_sum_parts_kernel(const ConvCudaBackward args, const int parts) {
  const int width = args.sizes.terms + 1;
  const int64_t count = int64_t{args.sizes.K} * width;
  const int64_t at = int64_t{gpu::block()} * kThreads + gpu::thread();
  if (at >= count) return;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) sum += args.parts[part * count + at];
  const int64_t k = at / width;
  const int n = static_cast<int>(at % width);
  if (n < width - 1) {
    if (args.grad_weight != nullptr)
      gpu::store(static_cast<T*>(args.grad_weight), k * (width - 1) + n, sum);
  } else if (args.grad_bias != nullptr) {
    gpu::store(static_cast<T*>(args.grad_bias), k, sum);
  }
}

}  // namespace mbm::conv
