#pragma once

namespace mbm {

// In the order of geometry.py's ACTIVATIONS.
enum class Activation {
  kNone,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kSilu,
  kGelu,
  kGeluTanh,
  kHardswish,
  kSigmoid,
  kTanh
};

}  // namespace mbm
