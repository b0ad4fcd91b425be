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

  int widest_cluster() const { return max_cluster < 8 ? max_cluster : 16; }
};

struct Launch {
  int64_t blocks = 0;
  int cluster = 1;
  int threads = 0;
  size_t shared = 0;         // bytes
  bool cooperative = false;  // all blocks run at once, or none does
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
  if (l.cluster < 1 || l.cluster > device.widest_cluster() || l.blocks % l.cluster != 0)
    return cudaErrorInvalidConfiguration;
  if (l.shared > static_cast<size_t>(device.shared)) return cudaErrorInvalidValue;
  if (l.cooperative && l.blocks > device.multiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  emulation::launch({l.blocks, l.cluster, l.threads, l.shared, l.cooperative},
                    [&] { kernel(args...); });
  return cudaSuccess;
}

template <class... Params>
cudaError_t active_clusters(void (*)(Params...), const Launch& l, int* found) {
  const Device& device = emulated_device();
  const bool fits =
      l.cluster <= device.widest_cluster() && l.shared <= static_cast<size_t>(device.shared);
  *found = fits ? std::max(1, device.multiprocessors / l.cluster) : 0;
  return cudaSuccess;
}

// As if each block needed a multiprocessor for itself.
template <class... Params>
cudaError_t active_blocks(void (*)(Params...), const Launch& l, const Device& device, int* found) {
  *found = l.shared <= static_cast<size_t>(device.shared) ? device.multiprocessors : 0;
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

// What the runtime is told of a launch.
class LaunchConfig {
 public:
  template <class... Params>
  LaunchConfig(void (*kernel)(Params...), const Launch& l, cudaStream_t stream) {
    const auto* function = reinterpret_cast<const void*>(kernel);
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (l.shared > kWithoutAsking)
      error_ = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(l.shared));
    constexpr int kPortable = 8;
    if (error_ == cudaSuccess && l.cluster > kPortable)
      error_ = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    config_.gridDim = dim3(static_cast<unsigned>(l.blocks));
    config_.blockDim = dim3(static_cast<unsigned>(l.threads));
    config_.dynamicSmemBytes = l.shared;
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = 0;
    if (l.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes_[config_.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(l.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (l.cooperative) {
      cudaLaunchAttribute& cooperative = attributes_[config_.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  cudaError_t error() const { return error_; }
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
  cudaError_t error_ = cudaSuccess;
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& l, cudaStream_t stream,
                   const Args&... args) {
  if (l.blocks < 1 || l.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  const LaunchConfig config(kernel, l, stream);
  if (config.error() != cudaSuccess) return config.error();
  return cudaLaunchKernelEx(config.get(), kernel, Params(args)...);
}

// Clusters that run at once; 0 where none can.
template <class... Params>
cudaError_t active_clusters(void (*kernel)(Params...), const Launch& l, int* found) {
  const LaunchConfig config(kernel, l, nullptr);
  if (config.error() != cudaSuccess) return config.error();
  return cudaOccupancyMaxActiveClusters(found, kernel, config.get());
}

// Blocks that run at once on a device that is otherwise idle; 0 where none can.
template <class... Params>
cudaError_t active_blocks(void (*kernel)(Params...), const Launch& l, const Device& device,
                          int* found) {
  *found = 0;
  if (l.shared > static_cast<size_t>(device.shared)) return cudaSuccess;
  const LaunchConfig config(kernel, l, nullptr);
  if (config.error() != cudaSuccess) return config.error();
  int of_one = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, kernel, l.threads, l.shared);
  *found = of_one * device.multiprocessors;
  return error;
}

#endif

}  // namespace mbm::gpu
