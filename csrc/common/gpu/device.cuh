// gpu.cuh for the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define MBM_DEVICE __device__ __forceinline__
#define MBM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace mbm::gpu {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

MBM_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
MBM_DEVICE int warp() { return thread() / 32; }
MBM_DEVICE int lane() { return thread() % 32; }
MBM_DEVICE int block() { return static_cast<int>(blockIdx.x); }

MBM_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

MBM_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

MBM_DEVICE char* shared() {
  extern __shared__ __align__(16) char mbm_shared[];
  return mbm_shared;
}

MBM_DEVICE void block_barrier(const char*) { __syncthreads(); }

MBM_DEVICE void cluster_barrier(const char*) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

MBM_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

MBM_DEVICE void store_peer(float* p, int rank, float x) {
#if __CUDA_ARCH__ >= 900
  const auto mine = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(x) : "memory");
#else
  *p = x;
#endif
}

MBM_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

MBM_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MBM_DEVICE float exp(float x) { return expf(x); }
MBM_DEVICE float expm1(float x) { return expm1f(x); }
MBM_DEVICE float tanh(float x) { return tanhf(x); }

MBM_DEVICE float to_float(float x) { return x; }
MBM_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
MBM_DEVICE float to_float(float16 x) { return __half2float(x); }

MBM_DEVICE void store(float* p, int64_t i, float x) { p[i] = x; }
MBM_DEVICE void store(bfloat16* p, int64_t i, float x) { p[i] = __float2bfloat16_rn(x); }
MBM_DEVICE void store(float16* p, int64_t i, float x) { p[i] = __float2half_rn(x); }

}  // namespace mbm::gpu
