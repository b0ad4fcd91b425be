// A step in one launch: both products and the gates. A cluster takes 16 units of some rows; its
// blocks, and their warps, share the depth of both products.
//
// sm_90, bfloat16, rows of 8: 7 loads of 16 bytes and 6 mma for 32 of the depth. The limit for few
// rows is the weights' bytes, read once; for many, those that each block of rows reads again
// through L2.
#pragma once

#include "common/gpu/warp_product.cuh"
#include "gru/gate_step.cuh"
#include "gru_cell/gru_cell_cuda.h"

namespace mbm::gru {

constexpr int kCellWarps = 8;
constexpr int kCellThreads = 32 * kCellWarps;
constexpr int kCellUnits = gpu::kTileRows;
constexpr int kCellSums = 4;  // before r, z, n of the input and n of the state

template <int ROWS>
struct CellMemory {
  static constexpr int kPitch = kCellUnits + 4;
  static constexpr int kOutputs = ROWS * kCellUnits;
  static constexpr int kPartial = kCellSums * ROWS * kPitch;  // of a warp
  static constexpr int64_t kFloats = kCellWarps * kPartial + kCellSums * kOutputs;

  float* partial = reinterpret_cast<float*>(gpu::shared());
  float* sums = partial + kCellWarps * kPartial;  // [rank][sum][output of this block]

  MBM_DEVICE float* partial_of(int warp, int sum, int row) const {
    return partial + warp * kPartial + (sum * ROWS + row) * kPitch;
  }
};

// Which rows, units and part of the depth a warp has.
template <class T, int ROWS>
struct CellTile {
  static constexpr int kGroups = ROWS / gpu::kTileColumns;
  using Products = gpu::Sums<T>[kGroups][kCellSums];

  const GruCellCudaForward& args;
  int b0, u0;

  MBM_DEVICE explicit CellTile(const GruCellCudaForward& given) : args(given) {
    const int tile = gpu::block() / gpu::cluster_size();
    const int across = static_cast<int>((args.H + kCellUnits - 1) / kCellUnits);
    u0 = tile % across * kCellUnits;
    b0 = tile / across * ROWS;
  }

  // x [B, width] by w [3H, width]; n's sums are those of place N.
  template <int N>
  MBM_DEVICE void add(Products& sums, const T* x, int64_t x_b, const T* w, int width) const {
    constexpr int kStep = gpu::kChunk<T>;
    const bool whole = width % gpu::kQuad<T> == 0;
    const bool x_by_words = whole && x_b % gpu::kQuad<T> == 0 && on_words(x);
    const bool w_by_words = whole && on_words(w);
    const int first = (gpu::cluster_rank() * kCellWarps + gpu::warp()) * kStep;
    for (int k0 = first; k0 < width; k0 += gpu::cluster_size() * kCellWarps * kStep) {
      const int k = k0 + gpu::lane_depth<T>();
      gpu::RowPair weights[3];
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        const int u = u0 + gpu::lane_row();
        const T* row = w + (gate * args.H + u) * width;
        weights[gate].low = gpu::load_quad(row, k, u < args.H ? width : 0, w_by_words);
        weights[gate].high =
            gpu::load_quad(row + 8 * width, k, u + 8 < args.H ? width : 0, w_by_words);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < gpu::Sums<T>::kColumns; ++i) {
          const int b = b0 + group * gpu::kTileColumns + gpu::Sums<T>::column(i);
          const uint4 column = gpu::load_quad(x + b * x_b, k, b < args.B ? width : 0, x_by_words);
          sums[group][0].add(i, weights[0], column);
          sums[group][1].add(i, weights[1], column);
          sums[group][N].add(i, weights[2], column);
        }
    }
  }

  MBM_DEVICE static bool on_words(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
  }

  MBM_DEVICE void store(int b, int u, const float (&sums)[kCellSums]) const {
    const T* given = static_cast<const T*>(args.h);
    const auto bias = [&](const void* biases, int gate) {
      return biases == nullptr ? 0.0f
                               : gpu::to_float(static_cast<const T*>(biases)[gate * args.H + u]);
    };
    const Gates gates = gates_of<T>(sums[0] + bias(args.b_ih, 0) + bias(args.b_hh, 0),
                                    sums[1] + bias(args.b_ih, 1) + bias(args.b_hh, 1),
                                    sums[2] + bias(args.b_ih, 2), sums[3] + bias(args.b_hh, 2));
    gpu::store(static_cast<T*>(args.h_new), b * args.H + u,
               gates.next(gpu::to_float(given[b * args.h_b + u])));
    if (args.reserve != nullptr)
      gates.store(static_cast<T*>(args.reserve) + b * 4 * args.H, args.H, u);
  }
};

template <class T, int ROWS>
MBM_KERNEL(kCellThreads, 1)
gru_cell_fwd_kernel(const GruCellCudaForward args) {
  const CellTile<T, ROWS> tile(args);
  const CellMemory<ROWS> memory;
  constexpr int kOutputs = CellMemory<ROWS>::kOutputs;
  {
    typename CellTile<T, ROWS>::Products sums;
    tile.template add<2>(sums, static_cast<const T*>(args.x), args.x_b,
                         static_cast<const T*>(args.w_ih), static_cast<int>(args.C));
    tile.template add<3>(sums, static_cast<const T*>(args.h), args.h_b,
                         static_cast<const T*>(args.w_hh), static_cast<int>(args.H));
#pragma unroll
    for (int group = 0; group < ROWS / gpu::kTileColumns; ++group)
#pragma unroll
      for (int s = 0; s < kCellSums; ++s)
        gpu::store_tile(sums[group][s],
                        memory.partial_of(gpu::warp(), s, group * gpu::kTileColumns),
                        CellMemory<ROWS>::kPitch);
  }
  // Of the cluster, since the blocks that the next stores go to must have begun.
  gpu::cluster_barrier("partial sums stored");
  const int blocks = gpu::cluster_size(), share = kOutputs / blocks;
  for (int i = gpu::thread(); i < kCellSums * kOutputs; i += kCellThreads) {
    const int s = i / kOutputs, output = i % kOutputs;
    float sum = 0.0f;
    for (int w = 0; w < kCellWarps; ++w)
      sum += memory.partial_of(w, s, output / kCellUnits)[output % kCellUnits];
    gpu::store_peer(memory.sums + (gpu::cluster_rank() * kCellSums + s) * share + output % share,
                    output / share, sum);
  }
  gpu::cluster_barrier("sums sent");
  for (int i = gpu::thread(); i < share; i += kCellThreads) {
    const int output = gpu::cluster_rank() * share + i;
    const int b = tile.b0 + output / kCellUnits, u = tile.u0 + output % kCellUnits;
    if (b >= args.B || u >= args.H) continue;
    float sums[kCellSums] = {};
    for (int rank = 0; rank < blocks; ++rank)
      for (int s = 0; s < kCellSums; ++s)
        sums[s] += memory.sums[(rank * kCellSums + s) * share + i];
    tile.store(b, u, sums);
  }
}

// A thread for each unit of each row.
template <class T>
MBM_KERNEL(kCellThreads, 1)
gru_cell_bwd_kernel(const GruCellCudaBackward args) {
  const int64_t at = int64_t{gpu::block()} * kCellThreads + gpu::thread();
  if (at >= args.B * args.H) return;
  const int64_t b = at / args.H;
  const int u = static_cast<int>(at % args.H);
  const float g = gpu::to_float(static_cast<const T*>(args.grad_h_new)[b * args.grad_b + u]);
  const float h = gpu::to_float(static_cast<const T*>(args.h)[b * args.h_b + u]);
  const Gates gates = Gates::load(static_cast<const T*>(args.reserve) + b * 4 * args.H, args.H, u);
  gate_gradients(gates, g, h).store(static_cast<T*>(args.gates) + b * 4 * args.H, args.H, u);
  if (args.direct != nullptr) gpu::store(static_cast<T*>(args.direct), at, g * gates.z);
}

}  // namespace mbm::gru
