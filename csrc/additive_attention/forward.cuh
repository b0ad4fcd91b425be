// The forward kernel: scores of a tile of queries in shared memory, softmax, context.
#pragma once

#include "additive_attention/slice.cuh"

namespace mbm::additive {

template <class Tile>
struct ForwardMemory {
  float* stages;
  float* scores;   // [pitch][kT]: scores, then their exponentials, then weights of all slices
  float* maxima;   // [ranks][kT] of each slice's scores
  float* totals;   // [ranks][kT] of the exponentials
  float* scratch;  // [3 kWarps]

  static constexpr int kScratch = 3 * kWarps;
  static constexpr int64_t floats(int64_t pitch, int ranks) {
    return Tile::kRatioFloats + Tile::kT * (pitch + 2 * ranks) + kScratch;
  }
  MBM_DEVICE ForwardMemory(int pitch, int ranks) {
    stages = reinterpret_cast<float*>(gpu::shared());
    scores = stages + Tile::kRatioFloats;
    maxima = scores + Tile::kT * pitch;
    totals = maxima + Tile::kT * ranks;
    scratch = totals + Tile::kT * ranks;
  }
};

constexpr float kHidden = -1.0f;  // in place of an exponential, which is never negative but NaN

// Four sums: one, of many terms, would have several times the rounding of torch's.
template <class T>
MBM_DEVICE float direct_score(const T* query, const T* key, const T* v, int D) {
  float sums[4] = {};
#pragma unroll 1
  for (int d0 = 0; d0 < D; d0 += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = d0 + i;
      if (d >= D) break;
      const float argument = gpu::to_float(query[d]) + gpu::to_float(key[d]);
      sums[i] = fmaf(gpu::to_float(v[d]), gpu::tanh(argument), sums[i]);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T, int TILE_T>
MBM_DEVICE void score_slice(const Slice<T, TILE_T>& slice,
                            const ForwardMemory<ScoreTile<TILE_T>>& memory) {
  using Tile = ScoreTile<TILE_T>;
  const auto& in = slice.in;
  const int D = static_cast<int>(in.D);
  const T* v = static_cast<const T*>(in.v);
  const Rows<T> queries = slice.query_rows();
  Magnitudes mine{queries.magnitude(D), slice.key_rows(0, slice.width).magnitude(D), 0.0f};
  for (int d = gpu::thread(); d < D; d += kThreads)
    mine.v = fmaxf(mine.v, magnitude(gpu::to_float(v[d])));
  const Form form = block_max<kWarps>(mine, memory.scratch).form();
  for (int offset = 0; offset < slice.width; offset += Tile::kS) {
    const Rows<T> keys = slice.key_rows(offset, Tile::kS);
    if (form != Form::kDirect)
      sum_tile<Term::kTanh, T, Tile>(queries, keys, v, D, form == Form::kCentred, memory.stages);
    const int columns = min(Tile::kS, slice.width - offset);
    for (int i = gpu::thread(); i < Tile::kT * columns; i += kThreads) {
      const int t = i / columns, s = i % columns;
      float score = -INFINITY;
      if (slice.attends(t, slice.first + offset + s))
        score = form == Form::kDirect ? direct_score(queries.at(t), keys.at(s), v, D)
                                      : sum_of_parts<Tile>(memory.stages, t, s);
      memory.scores[(slice.first + offset + s) * Tile::kT + t] = score;
    }
    gpu::block_barrier("scores stored");
  }
}

// Scores of the slice become weights, which every block of the cluster gets.
template <class T, int TILE_T, class Tile>
MBM_DEVICE void normalise(const Slice<T, TILE_T>& slice, const ForwardMemory<Tile>& memory,
                          T* weights) {
  const int ranks = gpu::cluster_size(), rank = gpu::cluster_rank();
  const int end = slice.first + slice.width;
  for (int t = gpu::warp(); t < TILE_T; t += kWarps) {
    float* row = memory.scores + t;
    float most = -INFINITY;
    for (int s = slice.first + gpu::lane(); s < end; s += 32) most = fmaxf(most, row[s * TILE_T]);
    most = warp_max(most);
    float total = 0.0f;
    for (int s = slice.first + gpu::lane(); s < end; s += 32) {
      const bool hidden = row[s * TILE_T] == -INFINITY;
      const float power = gpu::exp(row[s * TILE_T] - most);
      total += hidden ? 0.0f : power;
      row[s * TILE_T] = hidden ? kHidden : power;
    }
    total = warp_sum(total);
    if (gpu::lane() < ranks) {
      gpu::store_peer(memory.maxima + rank * TILE_T + t, gpu::lane(), most);
      gpu::store_peer(memory.totals + rank * TILE_T + t, gpu::lane(), total);
    }
  }
  gpu::cluster_barrier("maxima and totals exchanged");
  for (int t = gpu::warp(); t < TILE_T; t += kWarps) {
    float most = -INFINITY, total = 0.0f;
    for (int r = 0; r < ranks; ++r) most = fmaxf(most, memory.maxima[r * TILE_T + t]);
    for (int r = 0; r < ranks; ++r)
      total += memory.totals[r * TILE_T + t] * gpu::exp(memory.maxima[r * TILE_T + t] - most);
    const float scale = gpu::exp(memory.maxima[rank * TILE_T + t] - most) / total;
    float* row = memory.scores + t;
    const int64_t to = (slice.b * slice.in.T + slice.t0 + t) * slice.in.S;
    for (int s = slice.first + gpu::lane(); s < end; s += 32) {
      const float weight = row[s * TILE_T] == kHidden ? 0.0f : row[s * TILE_T] * scale;
      for (int r = 0; r < ranks; ++r) gpu::store_peer(row + s * TILE_T, r, weight);
      if (t < slice.queries && s < slice.in.S) gpu::store(weights, to + s, weight);
    }
  }
  gpu::cluster_barrier("weights exchanged");
}

// sums[t] += weights[t] x. MASKED: a weight of 0 hides x, which may be anything.
template <bool MASKED, int TILE_T>
MBM_DEVICE void add_position(const float* weights, float x, float (&sums)[TILE_T]) {
#pragma unroll
  for (int t = 0; t < TILE_T; t += 4) {
    const float4 w = *reinterpret_cast<const float4*>(weights + t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = (&w.x)[i];
      sums[t + i] = fmaf(weight, MASKED && weight == 0.0f ? 0.0f : x, sums[t + i]);
    }
  }
}

// A thread's sums over its group's positions, 4 of every 4 kGroups, of one column of the values.
template <bool MASKED, class T, int TILE_T>
MBM_DEVICE void add_positions(const Slice<T, TILE_T>& slice, const float* weights, const T* value,
                              int group, int groups, float (&sums)[TILE_T]) {
  const int stride = static_cast<int>(slice.in.value_s);
  T next[4];
  const auto load = [&](int s0) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      next[j] = s0 + j < slice.count ? value[static_cast<int64_t>(s0 + j) * stride] : T{};
  };
  load(4 * group);
  for (int s0 = 4 * group; s0 < slice.count; s0 += 4 * groups) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = gpu::to_float(next[j]);
    load(s0 + 4 * groups);
#pragma unroll
    for (int j = 0; j < 4; ++j) add_position<MASKED>(weights + (s0 + j) * TILE_T, x[j], sums);
  }
}

// A block has a part of E. Groups of threads share the positions of a column of it.
template <class T, int TILE_T, class Tile>
MBM_DEVICE void attend(const Slice<T, TILE_T>& slice, const ForwardMemory<Tile>& memory,
                       T* context) {
  constexpr int kColumns = 256, kGroups = kThreads / kColumns;
  static_assert(kGroups == 2 && TILE_T * kColumns <= Tile::kRatioFloats);
  const auto& in = slice.in;
  const int E = static_cast<int>(in.E), ranks = gpu::cluster_size();
  const int part = (E + ranks - 1) / ranks;
  const int first = gpu::cluster_rank() * part, end = min(E, first + part);
  const int group = gpu::thread() / kColumns, column = gpu::thread() % kColumns;
  float* partial = memory.stages + column;  // [TILE_T][kColumns]
  for (int e0 = first; e0 < end; e0 += kColumns) {
    const int e = e0 + column;
    const T* value = static_cast<const T*>(in.value) + slice.b * in.value_b + e;
    float sums[TILE_T] = {};
    if (e < end && in.mask == nullptr)
      add_positions<false>(slice, memory.scores, value, group, kGroups, sums);
    else if (e < end)
      add_positions<true>(slice, memory.scores, value, group, kGroups, sums);
    if (e0 > first) gpu::block_barrier("partial contexts read");
    if (group == 1) {
#pragma unroll
      for (int t = 0; t < TILE_T; ++t) partial[t * kColumns] = sums[t];
    }
    gpu::block_barrier("partial contexts stored");
    if (group == 0 && e < end) {
#pragma unroll
      for (int t = 0; t < TILE_T; ++t)
        if (t < slice.queries)
          gpu::store(context, (slice.b * in.T + slice.t0 + t) * in.E + e,
                     sums[t] + partial[t * kColumns]);
    }
  }
}

// Clusters: a tile of TILE_T queries of a batch element each.
template <class T, int TILE_T>
MBM_KERNEL(kThreads, 1)
additive_attention_fwd_kernel(const AdditiveAttentionCudaForward args) {
  const Slice<T, TILE_T> slice(args.in);
  const ForwardMemory<ScoreTile<TILE_T>> memory(slice.pitch, gpu::cluster_size());
  // Shared memory of a peer may be written once all blocks of the cluster run.
  gpu::cluster_barrier("cluster begun");
  score_slice(slice, memory);
  normalise(slice, memory, static_cast<T*>(args.weights));
  attend(slice, memory, static_cast<T*>(args.context));
}

}  // namespace mbm::additive
