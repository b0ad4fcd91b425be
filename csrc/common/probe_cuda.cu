#include <cuda_runtime.h>

#include "common/probe.h"

namespace mbm {
namespace {

constexpr int kThreads = 32;

__global__ void probe_kernel(int* out) { out[threadIdx.x] = static_cast<int>(threadIdx.x) * 3 + 1; }

}  // namespace

const char* cuda_probe() {
  int devices = 0;
  if (cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess)
    return cudaGetErrorString(error);
  if (devices == 0) return "no CUDA device";
  int* out = nullptr;
  if (cudaError_t error = cudaMalloc(&out, kThreads * sizeof(int)); error != cudaSuccess)
    return cudaGetErrorString(error);
  probe_kernel<<<1, kThreads>>>(out);
  int host[kThreads] = {};
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost);
  cudaFree(out);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int i = 0; i < kThreads; ++i)
    if (host[i] != i * 3 + 1) return "the probe kernel wrote wrong values";
  return nullptr;
}

}  // namespace mbm
