// Sums over features of pairs (query, key), a tile of T x S of them at a time, by one block.
//
// A thread owns 4 x 4 pairs and every kSplits-th part of the features. Features pass through shared
// memory in stages, [feature][row], so that a thread reads 4 rows in one load; the rows of the next
// stage are loaded from memory while this one is summed.
#pragma once

#include "common/gpu/gpu.cuh"

namespace mbm::additive {

using gpu::bfloat16;
using gpu::float16;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kStage = 32;  // features of a stage

// How tanh(q + k) is found, with x = e^-2q and y = e^2k:
enum class Form {
  kRatio,    // (y - x) / (x + y)
  kCentred,  // the same, of y - 1 and x - 1 in the numerator: relative accuracy for small q + k
  kDirect,   // tanh itself, where the exponentials would overflow or an input is not finite
};

// What is summed over the features of a pair.
enum class Term {
  kTanh,     // v tanh(q + k) = (v y - v x) / (x + y)
  kProduct,  // q k
};

// Largest |query|, |key| and |v| of what a block reads; NaN counts as infinite.
struct Magnitudes {
  float query, key, v;

  MBM_DEVICE Form form() const {
    constexpr float kMostPair = 20.0f;  // e^80 v is a float
    constexpr float kMostV = 1e3f;
    const float pair = query + key;
    if (!(pair <= kMostPair) || !(v <= kMostV)) return Form::kDirect;
    return pair <= 1.0f ? Form::kCentred : Form::kRatio;
  }
};

MBM_DEVICE float magnitude(float x) { return x == x ? fabsf(x) : INFINITY; }

MBM_DEVICE float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, gpu::shuffle_xor(x, mask));
  return x;
}

MBM_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += gpu::shuffle_xor(x, mask);
  return x;
}

// Of a block of WARPS warps; `scratch` [3 WARPS] is used for nothing else.
template <int WARPS>
MBM_DEVICE Magnitudes block_max(Magnitudes mine, float* scratch) {
  mine = {warp_max(mine.query), warp_max(mine.key), warp_max(mine.v)};
  if (gpu::lane() == 0) {
    scratch[gpu::warp()] = mine.query;
    scratch[WARPS + gpu::warp()] = mine.key;
    scratch[2 * WARPS + gpu::warp()] = mine.v;
  }
  gpu::block_barrier("maxima stored");
#pragma unroll 1
  for (int w = 0; w < WARPS; ++w)
    mine = {fmaxf(mine.query, scratch[w]), fmaxf(mine.key, scratch[WARPS + w]),
            fmaxf(mine.v, scratch[2 * WARPS + w])};
  return mine;
}

// `count` rows of D contiguous features.
template <class T>
struct Rows {
  const T* data;
  int stride;
  int count;

  MBM_DEVICE const T* at(int row) const { return data + static_cast<int64_t>(row) * stride; }

  MBM_DEVICE float magnitude(int D) const {
    float most = 0.0f;
    for (int row = gpu::warp(); row < count; row += kWarps)
      for (int d = gpu::lane(); d < D; d += 32)
        most = fmaxf(most, additive::magnitude(gpu::to_float(at(row)[d])));
    return most;
  }
};

template <int TILE_T>
struct ScoreTile {
  static constexpr int kT = TILE_T;
  static constexpr int kGroupsT = kT / 4;
  static constexpr int kGroupsS = kT == 20 ? 25 : 32;
  static constexpr int kS = 4 * kGroupsS;
  static constexpr int kGroups = kGroupsT * kGroupsS;
  static constexpr int kSplits = kThreads / kGroups;
  static constexpr int kFeatures = kStage / kSplits;  // of a stage, for one thread
  // 4 modulo 8: the 8 features x 4 rows that a warp stores lie in 32 banks.
  static constexpr int kPitchT = kT % 8 == 0 ? kT + 4 : kT;
  static constexpr int kPitchS = kS % 8 == 0 ? kS + 4 : kS;
  static constexpr int kPlane = kStage * (kPitchT + kPitchS);
  static constexpr int kRounds = ((kT + kS) / 4 + 3) / 4;  // rows that a thread stores of a stage
  static constexpr int kPartFloats = kSplits * kT * kS;
  static_assert(kFeatures % 2 == 0);

  // Floats of shared memory: two stages, of one plane or, for ratios, two; then the splits' sums in
  // their place.
  static constexpr int kProductFloats = 2 * kPlane > kPartFloats ? 2 * kPlane : kPartFloats;
  static constexpr int kRatioFloats = 4 * kPlane;
  static_assert(kPartFloats <= kRatioFloats);
};

// A stage's rows on their way from memory: this thread's share, one feature of kRounds rows.
template <class T, class Tile>
struct StageRows {
  T rows[Tile::kRounds];
  float v;

  MBM_DEVICE static int feature() { return gpu::warp() % 4 * 8 + gpu::lane() % 8; }
  MBM_DEVICE static int row(int round) {
    return (gpu::warp() / 4 + 4 * round) * 4 + gpu::lane() / 8;
  }

  MBM_DEVICE void load(const Rows<T>& queries, const Rows<T>& keys, const T* v_ptr, int D,
                       int first) {
    const int d = first + feature();
    // Otherwise the addresses of all rows stay in registers: 200 bytes of spills.
    const Rows<T> some_queries{queries.data, gpu::opaque(queries.stride), queries.count};
    const Rows<T> some_keys{keys.data, gpu::opaque(keys.stride), keys.count};
    v = v_ptr != nullptr && d < D ? gpu::to_float(v_ptr[d]) : 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kRounds; ++i) {
      const int r = row(i) - Tile::kT;
      if (r < 0)
        rows[i] = d < D && row(i) < queries.count ? some_queries.at(row(i))[d] : T{};
      else
        rows[i] = d < D && r < keys.count ? some_keys.at(r)[d] : T{};
    }
  }

  // kTanh: x and y, in the second plane v x and v y, `centred` v (x - 1) and v (y - 1).
  template <Term TERM>
  MBM_DEVICE void store(float* stage, bool centred) const {
    float* x_to = stage + feature() * Tile::kPitchT;
    float* y_to = stage + kStage * Tile::kPitchT + feature() * Tile::kPitchS - Tile::kT;
#pragma unroll
    for (int i = 0; i < Tile::kRounds; ++i) {
      if (row(i) >= Tile::kT + Tile::kS) break;
      const bool is_query = row(i) < Tile::kT;
      float* to = (is_query ? x_to : y_to) + row(i);
      const float given = gpu::to_float(rows[i]);
      if constexpr (TERM == Term::kProduct) {
        *to = given;
      } else {
        const float doubled = is_query ? -2.0f * given : 2.0f * given;
        const float power = gpu::exp(doubled);
        *to = power;
        to[Tile::kPlane] = v * (centred ? gpu::expm1(doubled) : power);
      }
    }
  }
};

struct Sums {
  float of[4][4];  // [t][s]
};

template <Term TERM, class Tile>
MBM_DEVICE void add_stage(const float* stage, int group_t, int group_s, int first, Sums& sums) {
  const auto four = [](const float* p) { return *reinterpret_cast<const float4*>(p); };
  const float* x_at = stage + first * Tile::kPitchT + 4 * group_t;
  const float* y_at = stage + kStage * Tile::kPitchT + first * Tile::kPitchS + 4 * group_s;
#pragma unroll 1
  for (int d = 0; d < Tile::kFeatures; d += 2) {
    const float4 x0 = four(x_at), x1 = four(x_at + Tile::kPitchT);
    const float4 y0 = four(y_at), y1 = four(y_at + Tile::kPitchS);
    float4 p0{}, p1{}, w0{}, w1{};
    if constexpr (TERM == Term::kTanh) {
      p0 = four(x_at + Tile::kPlane), p1 = four(x_at + Tile::kPlane + Tile::kPitchT);
      w0 = four(y_at + Tile::kPlane), w1 = four(y_at + Tile::kPlane + Tile::kPitchS);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a0 = (&x0.x)[i], a1 = (&x1.x)[i], b0 = (&y0.x)[j], b1 = (&y1.x)[j];
        float& sum = sums.of[i][j];
        if constexpr (TERM == Term::kProduct) {
          sum = fmaf(a1, b1, fmaf(a0, b0, sum));
        } else {
          // Two features share one reciprocal: 9 instructions.
          const float d0 = a0 + b0, d1 = a1 + b1;
          const float n0 = (&w0.x)[j] - (&p0.x)[i], n1 = (&w1.x)[j] - (&p1.x)[i];
          sum = fmaf(fmaf(n0, d1, n1 * d0), gpu::reciprocal(d0 * d1), sum);
        }
      }
    x_at += 2 * Tile::kPitchT;
    y_at += 2 * Tile::kPitchS;
  }
}

// parts[split][t][s] = the sums of a tile of pairs over each split's features, in the same memory
// as the stages. All threads have left when it is written and arrive before it is read.
template <Term TERM, class T, class Tile>
MBM_DEVICE void sum_tile(const Rows<T>& queries, const Rows<T>& keys, const T* v, int D,
                         bool centred, float* memory) {
  constexpr int kFloats = (TERM == Term::kProduct ? 1 : 2) * Tile::kPlane;  // of a stage
  const int split = gpu::thread() / Tile::kGroups, place = gpu::thread() % Tile::kGroups;
  const int group_t = place % Tile::kGroupsT, group_s = place / Tile::kGroupsT;
  const bool sums_pairs = split < Tile::kSplits;
  Sums sums{};
  StageRows<T, Tile> next;
  next.load(queries, keys, v, D, 0);
  next.template store<TERM>(memory, centred);
  gpu::block_barrier("first stage stored");
  const int stages = (D + kStage - 1) / kStage;
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    const bool more = i + 1 < stages;
    if (more) next.load(queries, keys, v, D, (i + 1) * kStage);
    if (sums_pairs)
      add_stage<TERM, Tile>(memory + i % 2 * kFloats, group_t, group_s, split * Tile::kFeatures,
                            sums);
    if (more) next.template store<TERM>(memory + (i + 1) % 2 * kFloats, centred);
    gpu::block_barrier("stage stored");
  }
  if (sums_pairs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = memory + ((split * Tile::kT + 4 * group_t + i) * Tile::kS + 4 * group_s);
      *reinterpret_cast<float4*>(to) =
          float4{sums.of[i][0], sums.of[i][1], sums.of[i][2], sums.of[i][3]};
    }
  }
  gpu::block_barrier("parts stored");
}

template <class Tile>
MBM_DEVICE float sum_of_parts(const float* parts, int t, int s) {
  float sum = 0.0f;
#pragma unroll
  for (int split = 0; split < Tile::kSplits; ++split)
    sum += parts[(split * Tile::kT + t) * Tile::kS + s];
  return sum;
}

}  // namespace mbm::additive
