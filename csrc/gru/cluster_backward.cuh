// The gradients of a GRU's gates over a cluster, from the last step to the first: as
// cluster_forward.cuh, with W_hh transposed in registers and three vectors exchanged in a step.
#pragma once

#include "gru/cluster.cuh"
#include "gru/gate_step.cuh"

namespace mbm::gru {

template <class T, int UNITS, int CLUSTER>
using BackwardShape = Shape<T, UNITS, CLUSTER, 3, 1>;

// A thread's unit of one row through all steps.
template <class T, class S>
struct BackwardUnit {
  Own<S> at;
  int length;
  float carried = 0.0f;  // the gradient of the state
  Gates gates;
  float before, arriving;  // the state before the step; the gradient of y

  MBM_DEVICE void begin(const GruCudaBackward& args, const ClusterRows& rows, int j) {
    at.begin(args.sizes, rows, j);
    length = at.inside ? ClusterRows::length(args.sizes, at.b) : 0;
    if (at.inside) carried = args.direction[rows.direction].carried[at.b * args.sizes.H + at.u];
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
};

template <class T, int UNITS, int CLUSTER>
MBM_DEVICE void run_backward(const GruCudaBackward& args) {
  using S = BackwardShape<T, UNITS, CLUSTER>;
  const GruCudaSizes& sizes = args.sizes;
  const int H = static_cast<int>(sizes.H);
  const ClusterRows rows(sizes, CLUSTER);
  const auto& direction = args.direction[rows.direction];
  const Exchange<T, S> exchange;
  const int last = rows.longest;  // whose vectors are those of the first step in time
  exchange.begin(last);

  const RowsOfWeights<T> w(direction.w_hh_transposed, H);
  const Resident<T, S, 1> resident(exchange, [&](int, int unit, int k) {
    const int u = gpu::cluster_rank() * S::kUnits + unit;
    return w.quad(3 * u + k / UNITS, k % UNITS, u < H);
  });
  BackwardUnit<T, S> own[S::kOwn];
#pragma unroll
  for (int j = 0; j < S::kOwn; ++j) own[j].begin(args, rows, j);
  gpu::cluster_barrier("mbarriers begun");

  for (int step = 0; step <= last; ++step) {
    const int t = direction.reverse ? step : last - 1 - step;
    if (step < last) {
#pragma unroll
      for (auto& unit : own) unit.load(sizes, direction, t);
    }
    if (step > 0) {
      exchange.wait(step);
      resident.multiply(step);
      gpu::block_barrier("partial sums stored");
      exchange.end_reading(step, last);
#pragma unroll
      for (auto& unit : own)
        if (unit.at.row < kRows) unit.carried += total(exchange, step, 0, unit.at);
    }
    if (step == last) break;
#pragma unroll
    for (auto& unit : own) {
      const GateGradients by = unit.retreat(t);
      const auto& at = unit.at;
      exchange.send(step + 1, at.row, at.u, by.r, CLUSTER);
      exchange.send(step + 1, at.row, UNITS + at.u, by.z, CLUSTER);
      exchange.send(step + 1, at.row, 2 * UNITS + at.u, by.state_n, CLUSTER);
      if (t < unit.length)
        by.store(static_cast<T*>(direction.gates) + (t * sizes.B + at.b) * 4 * H, H, at.u);
    }
  }
  for (auto& unit : own)
    if (unit.at.inside) direction.carried[unit.at.b * sizes.H + unit.at.u] = unit.carried;
}

template <class T, int UNITS, int CLUSTER>
MBM_KERNEL((BackwardShape<T, UNITS, CLUSTER>::kThreads), 1)
gru_bwd_kernel(const GruCudaBackward args) {
  if constexpr (gpu::kHasClusters) run_backward<T, UNITS, CLUSTER>(args);
}

}  // namespace mbm::gru
