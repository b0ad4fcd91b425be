// The gates of a step on one vector of units, and their gradients; the maths is that of gru.h.
#pragma once

#include "common/activations.h"

namespace mbm::MBM_ISA {

struct GruGates {
  vf r, z, n;
  vf next(vf h) const { return fma(z, h - n, n); }
};

// What comes from the input (i) and the state (h), biases in one or the other.
inline GruGates gru_gates(vf ir, vf hr, vf iz, vf hz, vf in, vf hn) {
  GruGates g;
  g.r = sigmoid(ir + hr);
  g.z = sigmoid(iz + hz);
  g.n = tanh(fma(g.r, hn, in));
  return g;
}

// `saved` points into a row [4H] = r, z, n, hn of which `left` units remain.
inline void store_gates(float* saved, int64_t H, const GruGates& g, vf hn, int64_t left) {
  store_part(saved, g.r, left);
  store_part(saved + H, g.z, left);
  store_part(saved + 2 * H, g.n, left);
  store_part(saved + 3 * H, hn, left);
}

// g: the gradient of the new state; grad: into a row [4H] = n, r, z, hn, of which the first three
// meet W_ih, the last three W_hh. Returns what of g passes by the gates to the old state h.
inline vf grad_gates(const float* saved, int64_t H, vf h, vf g, float* grad, int64_t left) {
  const vf one = set1(1.0f);
  const vf r = load_part(saved, left), z = load_part(saved + H, left);
  const vf n = load_part(saved + 2 * H, left), hn = load_part(saved + 3 * H, left);
  const vf grad_n = g * (one - z) * (one - n * n);
  store_part(grad, grad_n, left);
  store_part(grad + H, grad_n * hn * r * (one - r), left);
  store_part(grad + 2 * H, g * (h - n) * z * (one - z), left);
  store_part(grad + 3 * H, grad_n * r, left);
  return g * z;
}

}  // namespace mbm::MBM_ISA
