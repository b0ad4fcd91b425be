// The gates of a step for one unit of one row, and their gradients; the maths is in
// mbm_kernels/ops/gru_cell/README.md.
#pragma once

#include "common/gpu/gpu.cuh"

namespace mbm::gru {

MBM_DEVICE float sigmoid(float x) { return gpu::reciprocal(1.0f + gpu::exp(-x)); }

// Near 0 off by an ulp of 1, which rounding to 16 bits hides.
template <class T>
MBM_DEVICE float tanh(float x) {
  if constexpr (sizeof(T) == 4)
    return gpu::tanh(x);
  else
    return fmaf(-2.0f, gpu::reciprocal(1.0f + gpu::exp(2.0f * x)), 1.0f);
}

struct Gates {
  float r, z, n, a;

  MBM_DEVICE float next(float h) const { return fmaf(z, h - n, n); }

  // Into a row [4H] = r, z, n, a.
  template <class T>
  MBM_DEVICE void store(T* row, int64_t H, int u) const {
    gpu::store(row, u, r);
    gpu::store(row, H + u, z);
    gpu::store(row, 2 * H + u, n);
    gpu::store(row, 3 * H + u, a);
  }
  template <class T>
  MBM_DEVICE static Gates load(const T* row, int64_t H, int u) {
    return {gpu::to_float(row[u]), gpu::to_float(row[H + u]), gpu::to_float(row[2 * H + u]),
            gpu::to_float(row[3 * H + u])};
  }
};

// Sums of input and state before r and z; input_n and a before n, each with its biases.
template <class T>
MBM_DEVICE Gates gates_of(float sum_r, float sum_z, float input_n, float a) {
  const float r = sigmoid(sum_r);
  return {r, sigmoid(sum_z), tanh<T>(fmaf(r, a, input_n)), a};
}

struct GateGradients {
  float n, r, z, state_n;  // state_n: as the product with the state gets n's

  // Into a row [4H] = n, r, z, state_n: the first three meet W_ih, the last three W_hh.
  template <class T>
  MBM_DEVICE void store(T* row, int64_t H, int u) const {
    gpu::store(row, u, n);
    gpu::store(row, H + u, r);
    gpu::store(row, 2 * H + u, z);
    gpu::store(row, 3 * H + u, state_n);
  }
};

// g: the gradient of the new state; h: the old one.
MBM_DEVICE GateGradients gate_gradients(const Gates& gates, float g, float h) {
  const auto& [r, z, n, a] = gates;
  const float by_n = g * (1.0f - z) * (1.0f - n * n);
  return {by_n, by_n * a * r * (1.0f - r), g * (h - n) * z * (1.0f - z), r * by_n};
}

}  // namespace mbm::gru
