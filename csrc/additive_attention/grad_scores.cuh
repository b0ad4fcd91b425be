// The backward's first kernel: gradients of the scores, softmax's backward included.
#pragma once

#include "additive_attention/slice.cuh"

namespace mbm::additive {

template <class Tile>
struct GradScoresMemory {
  float* stages;
  float* grads;  // [kT][width], by the weights
  float* dots;   // [ranks][kT], sums over each slice of weight times gradient

  static constexpr int64_t floats(int64_t width, int ranks) {
    return Tile::kProductFloats + Tile::kT * (width + ranks);
  }
  MBM_DEVICE explicit GradScoresMemory(int width) {
    stages = reinterpret_cast<float*>(gpu::shared());
    grads = stages + Tile::kProductFloats;
    dots = grads + Tile::kT * width;
  }
};

// grads = grad_context value^T + grad_weights, 0 where the weight is 0: whatever is hidden there.
template <class T, int TILE_T>
MBM_DEVICE void grad_weights_of_slice(const AdditiveAttentionCudaBackward& args,
                                      const Slice<T, TILE_T>& slice,
                                      const GradScoresMemory<ScoreTile<TILE_T>>& memory) {
  using Tile = ScoreTile<TILE_T>;
  const auto& in = args.in;
  const T* weights = static_cast<const T*>(args.weights);
  const T* given = static_cast<const T*>(args.grad_weights);
  Rows<T> arriving{nullptr, 0, 0};
  if (args.grad_context != nullptr)
    arriving = {static_cast<const T*>(args.grad_context) + slice.b * args.grad_context_b +
                    slice.t0 * args.grad_context_t,
                static_cast<int>(args.grad_context_t), slice.queries};
  for (int offset = 0; offset < slice.width; offset += Tile::kS) {
    if (args.grad_context != nullptr)
      sum_tile<Term::kProduct, T, Tile>(arriving, slice.value_rows(offset, Tile::kS), nullptr,
                                        static_cast<int>(in.E), false, memory.stages);
    const int columns = min(Tile::kS, slice.width - offset);
    for (int i = gpu::thread(); i < TILE_T * columns; i += kThreads) {
      const int t = i / columns, s = slice.first + offset + i % columns;
      const int64_t row = slice.b * in.T + slice.t0 + t;
      float grad = 0.0f;
      if (t < slice.queries && s < slice.count && gpu::to_float(weights[row * in.S + s]) != 0.0f) {
        if (args.grad_context != nullptr) grad = sum_of_parts<Tile>(memory.stages, t, i % columns);
        if (given != nullptr)
          grad += gpu::to_float(
              given[slice.b * args.grad_weights_b + (slice.t0 + t) * args.grad_weights_t + s]);
      }
      memory.grads[t * slice.width + offset + i % columns] = grad;
    }
    gpu::block_barrier("gradients stored");
  }
}

// grad_scores[b][s][t] = weight (gradient - sum over s of weight gradient), 0 past T.
template <class T, int TILE_T>
MBM_KERNEL(kThreads, 1)
additive_attention_grad_scores_kernel(const AdditiveAttentionCudaBackward args, int rows) {
  const auto& in = args.in;
  const Slice<T, TILE_T> slice(in);
  const GradScoresMemory<ScoreTile<TILE_T>> memory(slice.width);
  const int ranks = gpu::cluster_size(), rank = gpu::cluster_rank();
  const T* weights = static_cast<const T*>(args.weights);
  gpu::cluster_barrier("cluster begun");
  grad_weights_of_slice(args, slice, memory);
  const int columns = min(slice.width, max(0, static_cast<int>(in.S) - slice.first));
  for (int t = gpu::warp(); t < TILE_T; t += kWarps) {
    float dot = 0.0f;
    const T* row = weights + (slice.b * in.T + slice.t0 + t) * in.S + slice.first;
    if (t < slice.queries)
      for (int s = gpu::lane(); s < columns; s += 32)
        dot = fmaf(gpu::to_float(row[s]), memory.grads[t * slice.width + s], dot);
    dot = warp_sum(dot);
    if (gpu::lane() < ranks) gpu::store_peer(memory.dots + rank * TILE_T + t, gpu::lane(), dot);
  }
  gpu::cluster_barrier("dots exchanged");
  const bool is_last = slice.t0 + TILE_T >= in.T;
  const int height = is_last ? rows - slice.t0 : TILE_T;
  for (int i = gpu::thread(); i < columns * height; i += kThreads) {
    const int s = i / height, t = i % height;
    float grad = 0.0f;
    if (t < slice.queries) {
      float dot = 0.0f;
      for (int r = 0; r < ranks; ++r) dot += memory.dots[r * TILE_T + t];
      const int64_t at = (slice.b * in.T + slice.t0 + t) * in.S + slice.first + s;
      const float weight = gpu::to_float(weights[at]);
      if (weight != 0.0f) grad = weight * (memory.grads[t * slice.width + s] - dot);
    }
    args.grad_scores[(slice.b * in.S + slice.first + s) * rows + slice.t0 + t] = grad;
  }
}

}  // namespace mbm::additive
