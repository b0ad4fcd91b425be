// The gradients of a GRU's gates over a cluster, from the last step to the first: as
// cluster_forward.cuh, with W_hh transposed in registers and three vectors exchanged in a step.
#pragma once

#include "gru/cluster.cuh"
#include "gru/unit.cuh"

namespace mbm::gru {

template <class T, int UNITS, int CLUSTER>
using BackwardCluster = ClusterExchange<Shape<T, UNITS, CLUSTER, 3, 1>>;

template <class T, int UNITS, int CLUSTER>
MBM_DEVICE void run_backward(const GruCudaBackward& args) {
  using S = Shape<T, UNITS, CLUSTER, 3, 1>;
  const GruCudaSizes& sizes = args.sizes;
  const int H = static_cast<int>(sizes.H);
  const ClusterRows rows(sizes, CLUSTER);
  const auto& direction = args.direction[rows.direction];
  const ClusterExchange<S> exchange;
  const int last = rows.longest;  // whose vectors are those of the first step in time
  exchange.begin(last);

  const RowsOfWeights<T> w(direction.w_hh_transposed, H);
  const Resident<S> resident(exchange.memory, [&](int, int unit, int k) {
    const int u = gpu::cluster_rank() * S::kUnits + unit;
    return w.quad(3 * u + k / UNITS, k % UNITS, u < H);
  });
  BackwardUnit<S> own[S::kOwn];
#pragma unroll
  for (int j = 0; j < S::kOwn; ++j) {
    own[j].place(sizes, rows.b0, gpu::cluster_rank(), j);
    own[j].load_carried(sizes, direction.carried);
  }
  gpu::cluster_barrier("mbarriers begun");

  for (int step = 0; step <= last; ++step) {
    const int t = direction.reverse ? step : last - 1 - step;
    if (step < last) {
#pragma unroll
      for (auto& unit : own) unit.load(sizes, direction, t);
    }
    if (step > 0) {
      exchange.wait(step);
      resident.multiply(step, exchange.vectors(step));
      gpu::block_barrier("partial sums stored");
      exchange.end_reading(step, last);
#pragma unroll
      for (auto& unit : own)
        if (unit.at.row < kRows) unit.carried += exchange.memory.total(step, 0, unit.at);
    }
    if (step == last) break;
#pragma unroll
    for (auto& unit : own) {
      const GateGradients by = unit.retreat(t);
      exchange.send(step + 1, unit.at.row, unit.at.u, by.r);
      exchange.send(step + 1, unit.at.row, UNITS + unit.at.u, by.z);
      exchange.send(step + 1, unit.at.row, 2 * UNITS + unit.at.u, by.state_n);
      unit.store(sizes, direction, by, t);
    }
  }
  for (auto& unit : own) unit.store_carried(sizes, direction.carried);
}

template <class T, int UNITS, int CLUSTER>
MBM_KERNEL((BackwardCluster<T, UNITS, CLUSTER>::kThreads), 1)
gru_bwd_kernel(const GruCudaBackward args) {
  if constexpr (gpu::kHasClusters) run_backward<T, UNITS, CLUSTER>(args);
}

}  // namespace mbm::gru
