// Launches of kernels written against gpu.cuh, and what a launcher must know of the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/gpu/runtime.h"

#ifdef MBM_EMULATED
#include "common/gpu/emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace mbm::gpu {

struct Device {
  int multiprocessors = 0;
  int shared = 0;       // bytes of dynamic shared memory that a block may have
  int max_cluster = 1;  // blocks of a portable cluster
};

struct Launch {
  int64_t blocks = 0;
  int cluster = 1;
  int threads = 0;
  size_t shared = 0;  // bytes
};

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

#ifdef MBM_EMULATED

// What launches see instead of a device; tests set it.
inline Device& emulated_device() {
  static Device device{132, 227 * 1024, 8};  // an H200's
  return device;
}

inline cudaError_t find_device(int, Device* found) {
  *found = emulated_device();
  return cudaSuccess;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  cudaError_t error() const { return cudaSuccess; }
};

// Refuses what the device would refuse.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& l, cudaStream_t, const Args&... args) {
  const Device& device = emulated_device();
  if (l.blocks < 1 || l.blocks > kMostBlocks || l.threads < 1 || l.threads > 1024)
    return cudaErrorInvalidConfiguration;
  if (l.cluster < 1 || l.cluster > device.max_cluster || l.blocks % l.cluster != 0)
    return cudaErrorInvalidConfiguration;
  if (l.shared > static_cast<size_t>(device.shared)) return cudaErrorInvalidValue;
  emulation::launch({l.blocks, l.cluster, l.threads, l.shared}, [&] { kernel(args...); });
  return cudaSuccess;
}

#else

inline cudaError_t find_device(int device, Device* found) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  found->max_cluster = major >= 9 ? 8 : 1;
  return error;
}

// Makes `device` the current one as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& l, cudaStream_t stream,
                   const Args&... args) {
  if (l.blocks < 1 || l.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (l.shared > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.blocks));
  config.blockDim = dim3(static_cast<unsigned>(l.threads));
  config.dynamicSmemBytes = l.shared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(l.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = l.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

#endif

}  // namespace mbm::gpu
