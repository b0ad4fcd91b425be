// The steps of a GRU over a cluster.
//
// A step and warp: one wait for the states, the products, one block barrier, the gates of the
// thread's own units, and their states to all blocks. The inputs of a step are loaded before the
// wait; its results are stored after the states are sent.
#pragma once

#include "gru/cluster.cuh"
#include "gru/gate_step.cuh"

namespace mbm::gru {

template <class T, int UNITS, int CLUSTER>
using ForwardShape = Shape<T, UNITS, CLUSTER, 1, 3>;

// A thread's unit of one row through all steps.
template <class T, class S>
struct ForwardUnit {
  Own<S> at;
  int length;
  float h = 0.0f;
  float bias[3] = {};
  float input[3];

  MBM_DEVICE void begin(const GruCudaForward& args, const ClusterRows& rows, int j) {
    at.begin(args.sizes, rows, j);
    length = ClusterRows::length(args.sizes, at.b);
    const auto& direction = args.direction[rows.direction];
    const int64_t H = args.sizes.H;
    if (!at.inside) length = 0;
    if (at.inside && direction.h0 != nullptr)
      h = gpu::to_float(static_cast<const T*>(direction.h0)[at.b * H + at.u]);
    if (at.inside && direction.b_hh != nullptr)
      for (int gate = 0; gate < 3; ++gate)
        bias[gate] = gpu::to_float(static_cast<const T*>(direction.b_hh)[gate * H + at.u]);
  }

  MBM_DEVICE void load(const GruCudaSizes& sizes, const void* inputs, int t) {
    if (t >= length) return;
    const T* row = static_cast<const T*>(inputs) + (t * sizes.B + at.b) * 3 * sizes.H + at.u;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) input[gate] = gpu::to_float(row[gate * sizes.H]);
  }

  MBM_DEVICE Gates advance(const Exchange<T, S>& exchange, int step, int t) {
    if (t >= length) return {};
    const Gates gates = gates_of<T>(input[0] + bias[0] + total(exchange, step, 0, at),
                                    input[1] + bias[1] + total(exchange, step, 1, at), input[2],
                                    bias[2] + total(exchange, step, 2, at));
    h = gates.next(h);
    return gates;
  }
};

template <class T, int UNITS, int CLUSTER>
MBM_DEVICE void run_forward(const GruCudaForward& args) {
  using S = ForwardShape<T, UNITS, CLUSTER>;
  const GruCudaSizes& sizes = args.sizes;
  const int H = static_cast<int>(sizes.H);
  const ClusterRows rows(sizes, CLUSTER);
  const auto& direction = args.direction[rows.direction];
  const Exchange<T, S> exchange;
  const int last = rows.longest - 1;
  exchange.begin(last);

  const RowsOfWeights<T> w(direction.w_hh, H);
  const Resident<T, S, 3> resident(exchange, [&](int gate, int unit, int k) {
    const int u = gpu::cluster_rank() * S::kUnits + unit;
    return w.quad(gate * H + u, k, u < H);
  });
  const T* h0 = static_cast<const T*>(direction.h0);
  for (int i = gpu::thread(); i < kRows * UNITS; i += S::kThreads) {
    const int row = i / UNITS, u = i % UNITS, b = rows.b0 + row;
    const bool given = h0 != nullptr && u < H && b < sizes.B;
    exchange.row(0, row)[u] = given ? h0[int64_t{b} * H + u] : gpu::from_float<T>(0.0f);
  }
  ForwardUnit<T, S> own[S::kOwn];
#pragma unroll
  for (int j = 0; j < S::kOwn; ++j) own[j].begin(args, rows, j);
  gpu::cluster_barrier("first states stored");

  for (int step = 0; step <= last; ++step) {
    const int t = direction.reverse ? last - step : step;
#pragma unroll
    for (auto& unit : own) unit.load(sizes, direction.inputs, t);
    if (step > 0) exchange.wait(step);
    resident.multiply(step);
    gpu::block_barrier("partial sums stored");
    exchange.end_reading(step, last);
#pragma unroll
    for (auto& unit : own) {
      const Gates gates = unit.advance(exchange, step, t);
      if (step < last) exchange.send(step + 1, unit.at.row, unit.at.u, unit.h, CLUSTER);
      if (t >= unit.length) continue;
      const int64_t row = t * sizes.B + unit.at.b;
      gpu::store(static_cast<T*>(direction.y), t * sizes.y_t + unit.at.b * sizes.y_b + unit.at.u,
                 unit.h);
      if (direction.reserve != nullptr)
        gates.store(static_cast<T*>(direction.reserve) + row * 4 * H, H, unit.at.u);
    }
  }
  for (auto& unit : own)
    if (unit.at.inside)
      gpu::store(static_cast<T*>(direction.h_n), int64_t{unit.at.b} * H + unit.at.u, unit.h);
}

template <class T, int UNITS, int CLUSTER>
MBM_KERNEL((ForwardShape<T, UNITS, CLUSTER>::kThreads), 1)
gru_fwd_kernel(const GruCudaForward args) {
  if constexpr (gpu::kHasClusters) run_forward<T, UNITS, CLUSTER>(args);
}

}  // namespace mbm::gru
