// A few queries against keys whose exponentials were made before: a step of decoding. A warp takes
// 4 keys at a time, a lane 4 features of each.
#pragma once

#include "additive_attention/forward.cuh"

namespace mbm::additive {

constexpr int kKeyThreads = 256;   // of the kernel that makes the exponentials, a warp a key
constexpr int kDecodeKeys = 4;     // of a warp at a time
constexpr int kDecodeChunk = 512;  // features whose queries lie in shared memory

// Shared memory: x and v x of each query, then v, of a chunk of features; later parts of contexts.
template <int QUERIES>
struct DecodeTile {
  static constexpr int kT = QUERIES < 4 ? 4 : QUERIES;
  static constexpr int kChunkFloats = kDecodeChunk * (2 * QUERIES + 1);
  static constexpr int kRatioFloats = kChunkFloats > 256 * kT ? kChunkFloats : 256 * kT;
};

MBM_DEVICE int powers_pitch(int64_t D) { return static_cast<int>((D + 3) / 4 * 4); }

// A key for each warp.
template <class T>
MBM_KERNEL(kKeyThreads, 1)
additive_attention_keys_kernel(const AdditiveAttentionCudaKeys args) {
  const int64_t row = static_cast<int64_t>(gpu::block()) * (kKeyThreads / 32) + gpu::warp();
  if (row >= args.B * args.S) return;
  const T* key =
      static_cast<const T*>(args.key) + row / args.S * args.key_b + row % args.S * args.key_s;
  const int pitch = powers_pitch(args.D);
  float most = 0.0f;
  for (int d = gpu::lane(); d < pitch; d += 32) {
    const float k = d < args.D ? gpu::to_float(key[d]) : 0.0f;
    most = fmaxf(most, magnitude(k));
    args.powers[row * pitch + d] = gpu::exp(2.0f * k);
  }
  most = warp_max(most);
  if (gpu::lane() == 0) args.magnitudes[row] = most;
}

MBM_DEVICE float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Features first .. first + width - 1, 0 past D; `width` is a multiple of 4.
template <int QUERIES, class T>
MBM_DEVICE void stage_queries(const Rows<T>& queries, const T* v, int D, int first, int width,
                              bool centred, float* stage) {
  for (int i = gpu::thread(); i < QUERIES * width; i += kThreads) {
    const int t = i / width, j = i % width, d = first + j;
    const float q = d < D && t < queries.count ? gpu::to_float(queries.at(t)[d]) : 0.0f;
    const float weight = d < D ? gpu::to_float(v[d]) : 0.0f;
    const float power = gpu::exp(-2.0f * q);
    stage[t * kDecodeChunk + j] = power;
    stage[(QUERIES + t) * kDecodeChunk + j] = weight * (centred ? gpu::expm1(-2.0f * q) : power);
    if (t == 0) stage[2 * QUERIES * kDecodeChunk + j] = weight;
  }
}

// sums[t, k] += the terms of this lane's features of KEYS keys, the last again where there are
// fewer.
template <bool CENTRED, int KEYS, int QUERIES, class T>
MBM_DEVICE void add_keys(const float* stage, const float* powers, int pitch, const Rows<T>& keys,
                         int D, int first, int width, float (&sums)[QUERIES * KEYS]) {
#pragma unroll 1
  for (int j = 4 * gpu::lane(); j < width; j += 128) {
    const float4 v = four(stage + 2 * QUERIES * kDecodeChunk + j);
    float4 y[KEYS], w[KEYS];
#pragma unroll
    for (int k = 0; k < KEYS; ++k) {
      const int row = min(k, keys.count - 1);
      y[k] = four(powers + static_cast<int64_t>(row) * pitch + first + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (CENTRED) {
          const int d = first + j + i;
          const float given = d < D ? gpu::to_float(keys.at(row)[d]) : 0.0f;
          (&w[k].x)[i] = (&v.x)[i] * gpu::expm1(2.0f * given);
        } else {
          (&w[k].x)[i] = (&v.x)[i] * (&y[k].x)[i];
        }
      }
    }
#pragma unroll
    for (int t = 0; t < QUERIES; ++t) {
      const float4 x = four(stage + t * kDecodeChunk + j);
      const float4 p = four(stage + (QUERIES + t) * kDecodeChunk + j);
#pragma unroll
      for (int k = 0; k < KEYS; ++k)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          // Two features share one reciprocal, as in add_stage.
          const float d0 = (&x.x)[i] + (&y[k].x)[i], d1 = (&x.x)[i + 1] + (&y[k].x)[i + 1];
          const float n0 = (&w[k].x)[i] - (&p.x)[i], n1 = (&w[k].x)[i + 1] - (&p.x)[i + 1];
          float& sum = sums[t * KEYS + k];
          sum = fmaf(fmaf(n0, d1, n1 * d0), gpu::reciprocal(d0 * d1), sum);
        }
    }
  }
}

// Sums over the lanes of a warp of N values, by the bits of the lane from MASK down: each lane
// returns one of them, the one at `place`, which begins at 0.
template <int N, int MASK = 16>
MBM_DEVICE float sum_each(const float (&values)[N], int* place) {
  if constexpr (N == 1) {
    float sum = values[0];
#pragma unroll
    for (int mask = MASK; mask > 0; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
    return sum;
  } else {
    constexpr int kHalf = N / 2;
    const bool upper = (gpu::lane() & MASK) != 0;
    *place += upper ? kHalf : 0;
    float kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i)
      kept[i] = (upper ? values[i + kHalf] : values[i]) +
                gpu::shuffle_xor(upper ? values[i] : values[i + kHalf], MASK);
    return sum_each<kHalf, MASK / 2>(kept, place);
  }
}

// Scores of all keys of the slice over one chunk of features; the first chunk's are stored, those
// of others added by the lane that stored them.
template <bool CENTRED, class T, int TILE_T, int QUERIES>
MBM_DEVICE void score_chunk(const AdditiveAttentionCudaDecode& args, const Slice<T, TILE_T>& slice,
                            const ForwardMemory<DecodeTile<QUERIES>>& memory, int first,
                            int width) {
  const int D = static_cast<int>(slice.in.D), pitch = powers_pitch(D);
  // The registers of one expm1 for each feature of 4 keys would not fit beside the sums.
  constexpr int kKeys = CENTRED ? 1 : kDecodeKeys;
  const int filled = slice.filled(0, slice.width);
#pragma unroll 1
  for (int s0 = kKeys * gpu::warp(); s0 < filled; s0 += kKeys * kWarps) {
    constexpr int kSums = QUERIES * kKeys;
    float sums[kSums] = {};
    const int64_t row = slice.b * slice.in.S + slice.first + s0;
    add_keys<CENTRED, kKeys, QUERIES>(memory.stages, args.powers + row * pitch, pitch,
                                      slice.key_rows(s0, kKeys), D, first, width, sums);
    int place = 0;
    const float sum = sum_each(sums, &place);
    const int t = place / kKeys, s = slice.first + s0 + place % kKeys;
    // Of the lanes with the same sum the first stores it.
    if (gpu::lane() % (32 / kSums) == 0 && slice.attends(t, s)) {
      float* to = memory.scores + s * TILE_T + t;
      *to = first == 0 ? sum : *to + sum;
    }
  }
}

template <class T, int TILE_T, int QUERIES>
MBM_DEVICE void score_prepared(const AdditiveAttentionCudaDecode& args,
                               const Slice<T, TILE_T>& slice,
                               const ForwardMemory<DecodeTile<QUERIES>>& memory) {
  const auto& in = slice.in;
  const int D = static_cast<int>(in.D);
  const T* v = static_cast<const T*>(in.v);
  const Rows<T> queries = slice.query_rows();
  Magnitudes mine{queries.magnitude(D), 0.0f, 0.0f};
  for (int s = gpu::thread(); s < slice.filled(0, slice.width); s += kThreads)
    mine.key = fmaxf(mine.key, args.magnitudes[slice.b * in.S + slice.first + s]);
  for (int d = gpu::thread(); d < D; d += kThreads)
    mine.v = fmaxf(mine.v, magnitude(gpu::to_float(v[d])));
  const Form form = block_max<kWarps>(mine, memory.scratch).form();
  const Rows<T> keys = slice.key_rows(0, slice.width);
  for (int i = gpu::thread(); i < TILE_T * slice.width; i += kThreads) {
    const int t = i % TILE_T, s = i / TILE_T;
    float score = -INFINITY;
    if (form == Form::kDirect && slice.attends(t, slice.first + s))
      score = direct_score(queries.at(t), keys.at(s), v, D);
    memory.scores[(slice.first + s) * TILE_T + t] = score;
  }
  for (int first = 0; form != Form::kDirect && (first == 0 || first < D); first += kDecodeChunk) {
    const int width = min(kDecodeChunk, powers_pitch(D) - first);
    if (first > 0) gpu::block_barrier("chunk of queries read");
    stage_queries<QUERIES>(queries, v, D, first, width, form == Form::kCentred, memory.stages);
    gpu::block_barrier("chunk of queries stored");
    if (form == Form::kCentred)
      score_chunk<true>(args, slice, memory, first, width);
    else
      score_chunk<false>(args, slice, memory, first, width);
  }
  gpu::block_barrier("scores stored");
}

// Clusters: all queries of a batch element, QUERIES at most.
template <class T, int QUERIES>
MBM_KERNEL(kThreads, 1)
additive_attention_decode_kernel(const AdditiveAttentionCudaDecode args) {
  using Tile = DecodeTile<QUERIES>;
  const Slice<T, Tile::kT> slice(args.in);
  const ForwardMemory<Tile> memory(slice.pitch, gpu::cluster_size());
  gpu::cluster_barrier("cluster begun");
  score_prepared(args, slice, memory);
  normalise(slice, memory, static_cast<T*>(args.weights));
  attend(slice, memory, static_cast<T*>(args.context));
}

}  // namespace mbm::additive
