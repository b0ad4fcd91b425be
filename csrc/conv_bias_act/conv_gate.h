// What squeeze-and-excitation does to maps beside its convolutions (Hu, Shen and Sun, "Squeeze-and-
// Excitation Networks", CVPR 2018): the mean of each plane, and a factor for each plane. float32.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/isa.h"

namespace mbm {

// A map [B, C, pixels] without gaps; channels_last: [B, pixels, C] in memory. Sizes are positive
// but B, which may be 0.
struct DenseMap {
  int64_t B, C, pixels;
  bool channels_last;

  int64_t planes() const { return B * C; }
  int64_t elements() const { return planes() * pixels; }
  void check() const {
    if (B < 0 || C < 1 || pixels < 1)
      throw std::invalid_argument("sizes: got a map of " + std::to_string(B) + " x " +
                                  std::to_string(C) + " planes of " + std::to_string(pixels) +
                                  " pixels; expected positive sizes; call mbm_kernels.optimize");
  }
};

// What a factor goes through first.
enum class Gate { kNone, kHardsigmoid };

// means [B, C], written. Bitwise the same for any num_threads.
MBM_PER_ISA(void, plane_means, (const DenseMap& map, const float* x, float* means, int num_threads))
// y = x * gate(factors), factors [B, C]; y may be x.
MBM_PER_ISA(void, scale_planes,
            (const DenseMap& map, const float* x, const float* factors, Gate gate, float* y,
             int num_threads))

}  // namespace mbm
