// A thread's unit of one row through the steps, in each direction of time.
#pragma once

#include "gru/gate_step.cuh"
#include "gru/resident.cuh"

namespace mbm::gru {

template <class S>
struct ForwardUnit {
  using T = typename S::Element;
  Own<S> at;
  int length;
  float h = 0.0f;
  float bias[3] = {};
  float input[3];

  // Of 8 rows from b0 on; slice: the block's place in its group.
  MBM_DEVICE void place(const GruCudaSizes& sizes, int b0, int slice, int j) {
    at.begin(sizes, b0, slice, j);
    length = at.inside ? row_length(sizes, at.b) : 0;
  }
  MBM_DEVICE void load_first(const GruCudaSizes& sizes,
                             const GruCudaForward::Direction& direction) {
    h = 0.0f;
    if (at.inside && direction.h0 != nullptr)
      h = gpu::to_float(static_cast<const T*>(direction.h0)[at.b * sizes.H + at.u]);
  }
  MBM_DEVICE void load_carried(const GruCudaSizes& sizes, const float* from) {
    h = at.inside ? from[at.b * sizes.H + at.u] : 0.0f;
  }
  MBM_DEVICE void store_carried(const GruCudaSizes& sizes, float* to) const {
    if (at.inside) to[at.b * sizes.H + at.u] = h;
  }
  MBM_DEVICE void load_biases(const GruCudaSizes& sizes,
                              const GruCudaForward::Direction& direction) {
    if (at.row >= kRows || at.u >= sizes.H || direction.b_hh == nullptr) return;
    for (int gate = 0; gate < 3; ++gate)
      bias[gate] = gpu::to_float(static_cast<const T*>(direction.b_hh)[gate * sizes.H + at.u]);
  }

  MBM_DEVICE void load(const GruCudaSizes& sizes, const void* inputs, int t) {
    if (t >= length) return;
    const T* row = static_cast<const T*>(inputs) + (t * sizes.B + at.b) * 3 * sizes.H + at.u;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) input[gate] = gpu::to_float(row[gate * sizes.H]);
  }

  // With the sums of `number`.
  MBM_DEVICE Gates advance(const BlockMemory<S>& memory, int number, int t) {
    if (t >= length) return {};
    const Gates gates = gates_of<T>(input[0] + bias[0] + memory.total(number, 0, at),
                                    input[1] + bias[1] + memory.total(number, 1, at), input[2],
                                    bias[2] + memory.total(number, 2, at));
    h = gates.next(h);
    return gates;
  }

  MBM_DEVICE void store(const GruCudaSizes& sizes, const GruCudaForward::Direction& direction,
                        const Gates& gates, int t) const {
    if (t >= length) return;
    const int64_t row = t * sizes.B + at.b, H = sizes.H;
    gpu::store(static_cast<T*>(direction.y), t * sizes.y_t + at.b * sizes.y_b + at.u, h);
    if (direction.reserve != nullptr)
      gates.store(static_cast<T*>(direction.reserve) + row * 4 * H, H, at.u);
  }
  MBM_DEVICE void store_last(const GruCudaSizes& sizes,
                             const GruCudaForward::Direction& direction) const {
    if (at.inside) gpu::store(static_cast<T*>(direction.h_n), at.b * sizes.H + at.u, h);
  }
};

template <class S>
struct BackwardUnit {
  using T = typename S::Element;
  Own<S> at;
  int length;
  float carried = 0.0f;  // the gradient of the state
  Gates gates{};
  float before = 0.0f, arriving = 0.0f;  // the state before the step; the gradient of y

  MBM_DEVICE void place(const GruCudaSizes& sizes, int b0, int slice, int j) {
    at.begin(sizes, b0, slice, j);
    length = at.inside ? row_length(sizes, at.b) : 0;
  }
  MBM_DEVICE void load_carried(const GruCudaSizes& sizes, const float* from) {
    carried = at.inside ? from[at.b * sizes.H + at.u] : 0.0f;
  }
  MBM_DEVICE void store_carried(const GruCudaSizes& sizes, float* to) const {
    if (at.inside) to[at.b * sizes.H + at.u] = carried;
  }

  MBM_DEVICE void load(const GruCudaSizes& sizes, const GruCudaBackward::Direction& direction,
                       int t) {
    if (t >= length) return;
    const int64_t H = sizes.H;
    gates = Gates::load(static_cast<const T*>(direction.reserve) + (t * sizes.B + at.b) * 4 * H, H,
                        at.u);
    arriving = 0.0f;
    if (direction.grad_y != nullptr)
      arriving = gpu::to_float(static_cast<const T*>(
          direction.grad_y)[t * direction.grad_y_t + at.b * direction.grad_y_b + at.u]);
    const bool first = t == (direction.reverse ? length - 1 : 0);
    const int earlier = direction.reverse ? t + 1 : t - 1;
    before = 0.0f;
    if (!first)
      before = gpu::to_float(
          static_cast<const T*>(direction.y)[earlier * sizes.y_t + at.b * sizes.y_b + at.u]);
    else if (direction.h0 != nullptr)
      before = gpu::to_float(static_cast<const T*>(direction.h0)[at.b * H + at.u]);
  }

  MBM_DEVICE GateGradients retreat(int t) {
    if (t >= length) return {};
    const float g = carried + arriving;
    carried = g * gates.z;
    return gate_gradients(gates, g, before);
  }

  MBM_DEVICE void store(const GruCudaSizes& sizes, const GruCudaBackward::Direction& direction,
                        const GateGradients& by, int t) const {
    if (t >= length) return;
    const int64_t H = sizes.H;
    by.store(static_cast<T*>(direction.gates) + (t * sizes.B + at.b) * 4 * H, H, at.u);
  }
};

}  // namespace mbm::gru
