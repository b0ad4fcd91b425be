// A launcher's error as an exception, for bindings.
#pragma once

#include <stdexcept>
#include <string>

#include "common/gpu/runtime.h"

namespace mbm::gpu {

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA said: " + cudaGetErrorString(error));
}

}  // namespace mbm::gpu
