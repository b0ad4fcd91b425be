// Addresses arrive from Python as integers. A FakeTensor's is 0, and so is that of an empty tensor.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mbm {

// `count` elements of T at `address`; throws std::invalid_argument for a null address unless
// count is 0, and for one not aligned for T.
template <class T>
inline T* checked_ptr(std::uintptr_t address, int64_t count, const char* name) {
  if (count < 0) throw std::invalid_argument(std::string(name) + ": got a negative size");
  if (address == 0 && count > 0)
    throw std::invalid_argument(std::string(name) +
                                ": got a null address; expected a tensor with storage (a fake or "
                                "meta tensor must go through the registered op)");
  if (address % alignof(T) != 0)
    throw std::invalid_argument(std::string(name) + ": got a misaligned address");
  return reinterpret_cast<T*>(address);
}

// The same, but 0 stands for null.
template <class T>
inline T* optional_ptr(std::uintptr_t address, int64_t count, const char* name) {
  return address == 0 ? nullptr : checked_ptr<T>(address, count, name);
}

}  // namespace mbm
