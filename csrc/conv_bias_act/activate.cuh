// The activations, what a pool compares, and their slopes.
#pragma once

#include "common/gpu/gpu.cuh"
#include "conv_bias_act/activation.h"

namespace mbm::conv {

constexpr int kSlopeBit = 128;  // of a saved byte; the place in the window is in the other seven

// Whether a place's bit tells f', which then has at most two values.
MBM_DEVICE bool has_bit(Activation f) { return f <= Activation::kLeakyRelu; }

MBM_DEVICE float sigmoid(float z) { return 1.0f / (1.0f + gpu::exp(-z)); }
MBM_DEVICE float gelu_inner(float z) { return (z + z * z * z * 0.044715f) * 0.7978845608f; }

// Comparisons stand so that NaN stays NaN.
MBM_DEVICE float relu6(float z) { return z <= 0.0f ? 0.0f : z >= 6.0f ? 6.0f : z; }

MBM_DEVICE float activate(Activation f, float z) {
  switch (f) {
    case Activation::kNone: return z;
    case Activation::kRelu: return z <= 0.0f ? 0.0f : z;
    case Activation::kRelu6: return relu6(z);
    case Activation::kLeakyRelu: return z > 0.0f ? z : 0.01f * z;
    case Activation::kSilu: return z * sigmoid(z);
    case Activation::kGelu: return z * 0.5f * (1.0f + gpu::erf(z * 0.7071067812f));
    case Activation::kGeluTanh: return 0.5f * z * (1.0f + gpu::tanh(gelu_inner(z)));
    case Activation::kHardswish: return z * relu6(z + 3.0f) / 6.0f;
    case Activation::kSigmoid: return sigmoid(z);
    case Activation::kTanh: return gpu::tanh(z);
  }
  return z;
}

// Of the activations without a bit.
MBM_DEVICE float slope(Activation f, float z) {
  switch (f) {
    case Activation::kSilu: {
      const float s = sigmoid(z);
      return s * (1.0f + z * (1.0f - s));
    }
    case Activation::kGelu:
      return 0.5f * (1.0f + gpu::erf(z * 0.7071067812f)) +
             z * 0.3989422804f * gpu::exp(-0.5f * z * z);
    case Activation::kGeluTanh: {
      const float t = gpu::tanh(gelu_inner(z));
      const float inner = (1.0f + z * z * 0.134145f) * 0.7978845608f;
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner;
    }
    case Activation::kHardswish:
      return z <= -3.0f ? 0.0f : z < 3.0f ? (2.0f * z + 3.0f) / 6.0f : 1.0f;
    case Activation::kSigmoid: {
      const float s = sigmoid(z);
      return s * (1.0f - s);
    }
    case Activation::kTanh: {
      const float t = gpu::tanh(z);
      return 1.0f - t * t;
    }
    default: return 1.0f;
  }
}

// relu and relu6 commute with the maximum, gradients included.
MBM_DEVICE bool pools_first(Activation f) {
  return f == Activation::kRelu || f == Activation::kRelu6;
}

// A window's maximum so far. As in torch the first of equal values stays and NaN replaces anything.
struct Best {
  float value = 0.0f, z = 0.0f;
  int place = -1;

  MBM_DEVICE void take(float ranked, float its_z, int its_place) {
    if (place < 0 || ranked > value || ranked != ranked)
      value = ranked, z = its_z, place = its_place;
  }
};

// What is saved of a window: its place, and f' of the activations that have a bit.
MBM_DEVICE int code_of(Activation f, const Best& best) {
  bool steep = false;
  switch (f) {
    case Activation::kRelu: steep = !(best.value <= 0.0f); break;
    case Activation::kRelu6: steep = !(best.value <= 0.0f || best.value >= 6.0f); break;
    case Activation::kLeakyRelu: steep = best.value > 0.0f; break;
    default: break;
  }
  return best.place + (steep ? kSlopeBit : 0);
}

MBM_DEVICE float slope_of_code(Activation f, int code) {
  if (f == Activation::kNone || code >= kSlopeBit) return 1.0f;
  return f == Activation::kLeakyRelu ? 0.01f : 0.0f;
}

}  // namespace mbm::conv
