// gpu.cuh for the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define MBM_DEVICE __device__ __forceinline__
#define MBM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace mbm::gpu {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
struct tf32 {
  float value;
};

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

MBM_DEVICE void warp_barrier(const char*) { __syncwarp(); }

MBM_DEVICE void store_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

MBM_DEVICE void wait_flag(const char*, const uint32_t* flag, uint32_t value) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  } while (found < value);
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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

using Mbarrier = uint64_t;

MBM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

MBM_DEVICE void mbarrier_init(Mbarrier* m, int arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(m)),
      "r"(arrivals)
      : "memory");
}

MBM_DEVICE void mbarrier_expect(Mbarrier* m, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)),
               "r"(bytes)
               : "memory");
}

MBM_DEVICE void mbarrier_wait(const char*, Mbarrier* m, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(shared_address(m)),
      "r"(parity)
      : "memory");
}

MBM_DEVICE void store_peer_async(uint4* p, Mbarrier* m, int rank, uint4 words) {
  uint32_t to, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(p)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(m)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(counter)
      : "memory");
}

#define MBM_MMA(depth, type)                                                          \
  asm volatile("mma.sync.aligned.m16n8k" depth ".row.col.f32." type "." type          \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
MBM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, tf32>)
    MBM_MMA("8", "tf32");
  else if constexpr (std::is_same_v<T, bfloat16>)
    MBM_MMA("16", "bf16");
  else
    MBM_MMA("16", "f16");
}

#undef MBM_MMA

MBM_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
MBM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MBM_DEVICE uint32_t as_word(float x) { return __float_as_uint(x); }

MBM_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

MBM_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MBM_DEVICE float maximum(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

MBM_DEVICE float exp(float x) { return expf(x); }
MBM_DEVICE float expm1(float x) { return expm1f(x); }
MBM_DEVICE float tanh(float x) { return tanhf(x); }
MBM_DEVICE float erf(float x) { return erff(x); }

MBM_DEVICE float to_float(float x) { return x; }
MBM_DEVICE float to_float(tf32 x) { return x.value; }
MBM_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
MBM_DEVICE float to_float(float16 x) { return __half2float(x); }

MBM_DEVICE uint32_t bits_of(bfloat16 x) { return __bfloat16_as_ushort(x); }
MBM_DEVICE uint32_t bits_of(float16 x) { return __half_as_ushort(x); }

template <class T>
MBM_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, float16>)
    return __float2half_rn(x);
  else
    return T{x};
}

template <class T>
MBM_DEVICE T factor(T x) {
  if constexpr (std::is_same_v<T, tf32>) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x.value));
    return {as_float(bits)};
  } else {
    return x;
  }
}

MBM_DEVICE uint4 load_words(const void* p) { return *static_cast<const uint4*>(p); }
MBM_DEVICE uint4 load_words_l2(const void* p) {
  uint4 words;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(p)
               : "memory");
  return words;
}
MBM_DEVICE void store_words(void* p, uint4 words) { *static_cast<uint4*>(p) = words; }

MBM_DEVICE void store_pair(void* p, uint32_t low, uint32_t high) {
  *static_cast<uint2*>(p) = make_uint2(low, high);
}

template <class T>
MBM_DEVICE void store_bits(T* p, int64_t i, uint32_t bits) {
  reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits);
}

MBM_DEVICE void store(float* p, int64_t i, float x) { p[i] = x; }
MBM_DEVICE void store(tf32* p, int64_t i, float x) { p[i].value = x; }
MBM_DEVICE void store(bfloat16* p, int64_t i, float x) { p[i] = from_float<bfloat16>(x); }
MBM_DEVICE void store(float16* p, int64_t i, float x) { p[i] = from_float<float16>(x); }

}  // namespace mbm::gpu
