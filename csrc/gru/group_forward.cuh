// The steps of a GRU over groups of blocks, for devices without clusters and for more units than a
// cluster holds: as cluster_forward.cuh, but for the exchange.
//
// The states of a thread's own units lie in `carried`, since a group has any number of tiles; they
// are loaded with the inputs, before the wait.
#pragma once

#include "gru/group.cuh"
#include "gru/unit.cuh"

namespace mbm::gru {

template <class T, int UNITS>
using ForwardGroup = GroupExchange<GroupShape<T, UNITS, 1, 3>>;

template <class T, int UNITS>
MBM_DEVICE void run_forward(const GruCudaForward& args, int of_direction, int index) {
  using S = GroupShape<T, UNITS, 1, 3>;
  const GruCudaSizes& sizes = args.sizes;
  const int H = static_cast<int>(sizes.H);
  const auto& direction = args.direction[of_direction];
  const Group group(sizes, of_direction, index, S::kBlocks);
  const GroupExchange<S> exchange(sizes, args.through, group);
  const int last = group.longest - 1;

  const RowsOfWeights<T> w(direction.w_hh, H);
  const Resident<S> resident(exchange.memory, [&](int gate, int unit, int k) {
    const int u = group.slice * S::kUnits + unit;
    return w.quad(gate * H + u, k, u < H);
  });
  ForwardUnit<S> own[S::kOwn];
#pragma unroll
  for (int j = 0; j < S::kOwn; ++j) {
    own[j].place(sizes, group.b0(0), group.slice, j);
    own[j].load_biases(sizes, direction);
  }
  for (int tile = 0; tile < group.tiles; ++tile) {
#pragma unroll
    for (int j = 0; j < S::kOwn; ++j) {
      own[j].place(sizes, group.b0(tile), group.slice, j);
      own[j].load_first(sizes, direction);
      own[j].store_carried(sizes, direction.carried);
      exchange.send({0, tile}, own[j].at.row, own[j].at.u, own[j].h);
    }
    exchange.publish({0, tile});
  }

  for (int step = 0; step <= last; ++step) {
    const int t = direction.reverse ? last - step : step;
    for (int tile = 0; tile < group.tiles; ++tile) {
      const Turn at{step, tile};
#pragma unroll
      for (int j = 0; j < S::kOwn; ++j) {
        own[j].place(sizes, group.b0(tile), group.slice, j);
        own[j].load_carried(sizes, direction.carried);
        own[j].load(sizes, direction.inputs, t);
      }
      exchange.receive(at);
      resident.multiply(exchange.number(at), exchange.vectors());
      gpu::block_barrier("partial sums stored");
      Gates gates[S::kOwn];
#pragma unroll
      for (int j = 0; j < S::kOwn; ++j) {
        gates[j] = own[j].advance(exchange.memory, exchange.number(at), t);
        if (step < last) exchange.send({step + 1, tile}, own[j].at.row, own[j].at.u, own[j].h);
      }
      if (step < last) exchange.publish({step + 1, tile});
#pragma unroll
      for (int j = 0; j < S::kOwn; ++j) {
        own[j].store_carried(sizes, direction.carried);
        own[j].store(sizes, direction, gates[j], t);
      }
    }
  }
  for (int tile = 0; tile < group.tiles; ++tile)
#pragma unroll
    for (int j = 0; j < S::kOwn; ++j) {
      own[j].place(sizes, group.b0(tile), group.slice, j);
      own[j].load_carried(sizes, direction.carried);
      own[j].store_last(sizes, direction);
    }
}

template <class T, int UNITS>
MBM_KERNEL((ForwardGroup<T, UNITS>::kThreads), 1)
gru_group_fwd_kernel(const GruCudaForward args, const int first_direction) {
  const int groups = args.sizes.groups, group = gpu::block() / (UNITS / kGroupUnits);
  run_forward<T, UNITS>(args, first_direction + group / groups, group % groups);
}

}  // namespace mbm::gru
