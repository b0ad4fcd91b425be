// The steps of a GRU over a cluster.
//
// A step and warp: one wait for the states, the products, one block barrier, the gates of the
// thread's own units, and their states to all blocks. The inputs of a step are loaded before the
// wait; its results are stored after the states are sent.
#pragma once

#include "gru/cluster.cuh"
#include "gru/unit.cuh"

namespace mbm::gru {

template <class T, int UNITS, int CLUSTER>
using ForwardCluster = ClusterExchange<Shape<T, UNITS, CLUSTER, 1, 3>>;

template <class T, int UNITS, int CLUSTER>
MBM_DEVICE void run_forward(const GruCudaForward& args) {
  using S = Shape<T, UNITS, CLUSTER, 1, 3>;
  const GruCudaSizes& sizes = args.sizes;
  const int H = static_cast<int>(sizes.H);
  const ClusterRows rows(sizes, CLUSTER);
  const auto& direction = args.direction[rows.direction];
  const ClusterExchange<S> exchange;
  const int last = rows.longest - 1;
  exchange.begin(last);

  const RowsOfWeights<T> w(direction.w_hh, H);
  const Resident<S> resident(exchange.memory, [&](int gate, int unit, int k) {
    const int u = gpu::cluster_rank() * S::kUnits + unit;
    return w.quad(gate * H + u, k, u < H);
  });
  const T* h0 = static_cast<const T*>(direction.h0);
  for (int i = gpu::thread(); i < kRows * UNITS; i += S::kThreads) {
    const int row = i / UNITS, u = i % UNITS, b = rows.b0 + row;
    const bool given = h0 != nullptr && u < H && b < sizes.B;
    exchange.row(0, row)[u] =
        given ? gpu::factor(h0[int64_t{b} * H + u]) : gpu::from_float<T>(0.0f);
  }
  ForwardUnit<S> own[S::kOwn];
#pragma unroll
  for (int j = 0; j < S::kOwn; ++j) {
    own[j].place(sizes, rows.b0, gpu::cluster_rank(), j);
    own[j].load_first(sizes, direction);
    own[j].load_biases(sizes, direction);
  }
  gpu::cluster_barrier("first states stored");

  for (int step = 0; step <= last; ++step) {
    const int t = direction.reverse ? last - step : step;
#pragma unroll
    for (auto& unit : own) unit.load(sizes, direction.inputs, t);
    if (step > 0) exchange.wait(step);
    resident.multiply(step, exchange.vectors(step));
    gpu::block_barrier("partial sums stored");
    exchange.end_reading(step, last);
#pragma unroll
    for (auto& unit : own) {
      const Gates gates = unit.advance(exchange.memory, step, t);
      if (step < last) exchange.send(step + 1, unit.at.row, unit.at.u, unit.h);
      unit.store(sizes, direction, gates, t);
    }
  }
  for (auto& unit : own) unit.store_last(sizes, direction);
}

template <class T, int UNITS, int CLUSTER>
MBM_KERNEL((ForwardCluster<T, UNITS, CLUSTER>::kThreads), 1)
gru_fwd_kernel(const GruCudaForward args) {
  if constexpr (gpu::kHasClusters) run_forward<T, UNITS, CLUSTER>(args);
}

}  // namespace mbm::gru
