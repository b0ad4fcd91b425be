// What problem blocks share beside their layout: fields within bounds, and real numbers as fields.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mbm {

// Throws std::invalid_argument unless least <= value <= most.
inline void check_field(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    throw std::invalid_argument("problem: got " + std::string(name) + " = " +
                                std::to_string(value) + "; expected " + std::to_string(least) +
                                " to " + std::to_string(most));
}

constexpr int64_t kMostElements = int64_t{1} << 48;  // of a dimension

// The float64 whose bits a field holds (_core/native.py: float_bits), rounded.
inline float real_field(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

}  // namespace mbm
