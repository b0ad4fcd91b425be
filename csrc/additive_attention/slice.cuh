// Which pairs a block of the attention's clusters has: some queries of one batch element, and a
// slice of the positions that its cluster shares.
#pragma once

#include "additive_attention/additive_attention_cuda.h"
#include "additive_attention/score_tile.cuh"

namespace mbm::additive {

template <class T, int TILE_T>
struct Slice {
  const AdditiveAttentionCudaInputs& in;
  int64_t b;
  int t0, queries;   // of the tile
  int count;         // positions up to the row's length
  int first, width;  // of the slice, a multiple of 4
  int pitch;         // positions of all slices

  MBM_DEVICE explicit Slice(const AdditiveAttentionCudaInputs& inputs) : in(inputs) {
    const int blocks = gpu::cluster_size();
    const int tiles = static_cast<int>((in.T + TILE_T - 1) / TILE_T);
    const int cluster = gpu::block() / blocks;
    b = cluster / tiles;
    t0 = cluster % tiles * TILE_T;
    queries = min(TILE_T, static_cast<int>(in.T) - t0);
    count = static_cast<int>(in.S);
    if (in.key_lengths != nullptr) {
      const int64_t length = in.key_lengths[b];
      count = length < 0 ? 0 : length < in.S ? static_cast<int>(length) : count;
    }
    width = slice_width(in.S, blocks);
    first = gpu::cluster_rank() * width;
    pitch = blocks * width;
  }

  MBM_DEVICE static int slice_width(int64_t S, int blocks) {
    return static_cast<int>((S + 4 * blocks - 1) / (4 * blocks)) * 4;
  }

  // Positions of the slice before the length, from `offset` on and `most` at most.
  MBM_DEVICE int filled(int offset, int most) const {
    return max(0, min(min(most, width - offset), count - first - offset));
  }

  MBM_DEVICE bool attends(int t, int s) const {
    if (t >= queries || s >= count) return false;
    if (in.mask == nullptr) return true;
    return in.mask[b * in.mask_b + (t0 + t) * in.mask_t + s * in.mask_s] != 0;
  }

  MBM_DEVICE Rows<T> query_rows() const {
    const T* data = static_cast<const T*>(in.query) + b * in.query_b + t0 * in.query_t;
    return {data, static_cast<int>(in.query_t), queries};
  }

  MBM_DEVICE Rows<T> key_rows(int offset, int most) const {
    const T* data = static_cast<const T*>(in.key) + b * in.key_b + (first + offset) * in.key_s;
    return {data, static_cast<int>(in.key_s), filled(offset, most)};
  }

  MBM_DEVICE Rows<T> value_rows(int offset, int most) const {
    const T* data =
        static_cast<const T*>(in.value) + b * in.value_b + (first + offset) * in.value_s;
    return {data, static_cast<int>(in.value_s), filled(offset, most)};
  }
};

}  // namespace mbm::additive
