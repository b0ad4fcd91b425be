// What every bind_cuda.cpp shares.
#pragma once

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "common/bind.h"
#include "common/gpu/runtime.h"

namespace mbm::gpu {

// A launcher's error as an exception.
inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA said: " + cudaGetErrorString(error));
}

using Place = std::tuple<int, Address>;  // device, stream

// A launcher's call without the interpreter's lock.
template <class Args>
void run(cudaError_t (*launcher)(const Args&, int, cudaStream_t), const Args& args,
         const Place& place, const char* op) {
  const auto [device, stream] = place;
  const pybind11::gil_scoped_release release;
  check(launcher(args, device, reinterpret_cast<cudaStream_t>(stream)), op);
}

// `count` elements of Dtype `dtype`.
inline const void* pointer(Address address, int64_t dtype, int64_t count, const char* name) {
  if (dtype == 0) return checked_ptr<const float>(address, count, name);
  return checked_ptr<const uint16_t>(address, count, name);
}

inline void* writable(Address address, int64_t dtype, int64_t count, const char* name) {
  return const_cast<void*>(pointer(address, dtype, count, name));
}

inline const void* optional_pointer(Address address, int64_t dtype, int64_t count,
                                    const char* name) {
  return address == 0 ? nullptr : pointer(address, dtype, count, name);
}

inline void* optional_writable(Address address, int64_t dtype, int64_t count, const char* name) {
  return const_cast<void*>(optional_pointer(address, dtype, count, name));
}

}  // namespace mbm::gpu
