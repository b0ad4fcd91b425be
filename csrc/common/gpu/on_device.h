// The way from an entry point, which knows a device and a dtype by number, to a typed launcher.
#pragma once

#include "common/gpu/gpu.cuh"
#include "common/gpu/launch.h"

namespace mbm::gpu {

// launch(device's properties, a zero of the element type), with `device` the current one.
template <class Launch>
cudaError_t on_device(int device, Dtype dtype, const Launch& launch) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  Device found;
  if (const cudaError_t error = find_device(device, &found); error != cudaSuccess) return error;
  switch (dtype) {
    case Dtype::kFloat32: return launch(found, float{});
    case Dtype::kBFloat16: return launch(found, bfloat16{});
    case Dtype::kFloat16: return launch(found, float16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace mbm::gpu
