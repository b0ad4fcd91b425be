// The gradients of a GRU's gates over groups of blocks, from the last step to the first: as
// cluster_backward.cuh, but for the exchange.
#pragma once

#include "gru/group.cuh"
#include "gru/unit.cuh"

namespace mbm::gru {

template <class T, int UNITS>
using BackwardGroup = GroupExchange<GroupShape<T, UNITS, 3, 1>>;

template <class T, int UNITS>
MBM_DEVICE void run_backward(const GruCudaBackward& args, int of_direction, int index) {
  using S = GroupShape<T, UNITS, 3, 1>;
  const GruCudaSizes& sizes = args.sizes;
  const int H = static_cast<int>(sizes.H);
  const auto& direction = args.direction[of_direction];
  const Group group(sizes, of_direction, index, S::kBlocks);
  const GroupExchange<S> exchange(sizes, args.through, group);
  const int last = group.longest;  // whose vectors are those of the first step in time

  const RowsOfWeights<T> w(direction.w_hh_transposed, H);
  const Resident<S> resident(exchange.memory, [&](int, int unit, int k) {
    const int u = group.slice * S::kUnits + unit;
    return w.quad(3 * u + k / UNITS, k % UNITS, u < H);
  });
  BackwardUnit<S> own[S::kOwn];

  for (int step = 0; step <= last; ++step) {
    const int t = direction.reverse ? step : last - 1 - step;
    for (int tile = 0; tile < group.tiles; ++tile) {
      const Turn at{step, tile}, next{step + 1, tile};
#pragma unroll
      for (int j = 0; j < S::kOwn; ++j) {
        own[j].place(sizes, group.b0(tile), group.slice, j);
        own[j].load_carried(sizes, direction.carried);
        if (step < last) own[j].load(sizes, direction, t);
      }
      if (step > 0) {
        exchange.receive(at);
        resident.multiply(exchange.number(at), exchange.vectors());
        gpu::block_barrier("partial sums stored");
#pragma unroll
        for (auto& unit : own)
          if (unit.at.row < kRows)
            unit.carried += exchange.memory.total(exchange.number(at), 0, unit.at);
      }
      GateGradients by[S::kOwn];
      if (step < last) {
#pragma unroll
        for (int j = 0; j < S::kOwn; ++j) {
          const auto& to = own[j].at;
          by[j] = own[j].retreat(t);
          exchange.send(next, to.row, to.u, by[j].r);
          exchange.send(next, to.row, UNITS + to.u, by[j].z);
          exchange.send(next, to.row, 2 * UNITS + to.u, by[j].state_n);
        }
        exchange.publish(next);
#pragma unroll
        for (int j = 0; j < S::kOwn; ++j) own[j].store(sizes, direction, by[j], t);
      }
      for (auto& unit : own) unit.store_carried(sizes, direction.carried);
    }
  }
}

template <class T, int UNITS>
MBM_KERNEL((BackwardGroup<T, UNITS>::kThreads), 1)
gru_group_bwd_kernel(const GruCudaBackward args, const int first_direction) {
  const int groups = args.sizes.groups, group = gpu::block() / (UNITS / kGroupUnits);
  run_backward<T, UNITS>(args, first_direction + group / groups, group % groups);
}

}  // namespace mbm::gru
