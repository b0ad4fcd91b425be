// The way from an entry point, which knows a device and a dtype by number, to a typed launcher.
#pragma once

#include "common/gpu/gpu.cuh"
#include "common/gpu/launch.h"

namespace mbm::gpu {

// visit(a zero of the element type).
template <class Visit>
cudaError_t with_dtype(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kFloat32: return visit(float{});
    case Dtype::kBFloat16: return visit(bfloat16{});
    case Dtype::kFloat16: return visit(float16{});
  }
  return cudaErrorInvalidValue;
}

// launch(device's properties), with `device` the current one.
template <class Launch>
cudaError_t on_device(int device, const Launch& launch) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  Device found;
  if (const cudaError_t error = find_device(device, &found); error != cudaSuccess) return error;
  return launch(found);
}

// launch(device's properties, a zero of the element type), likewise.
template <class Launch>
cudaError_t on_device(int device, Dtype dtype, const Launch& launch) {
  return on_device(device, [&](const Device& found) {
    return with_dtype(dtype, [&](auto zero) { return launch(found, zero); });
  });
}

}  // namespace mbm::gpu
