// Forward: scores tile by tile into `weights`, then softmax and context per block of queries.
#include <algorithm>

#include "additive_attention/additive_attention.h"
#include "additive_attention/small_matmul.h"
#include "additive_attention/tanh_forms.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kKeys = 4;              // keys of a tile
constexpr int kQueries = kLanes / 4;  // queries of a tile: kLanes sums in registers
// Vectors of d of one turn of the loop.
constexpr int kGroup = 2;
constexpr int64_t kChunk = 64;          // rows packed at a time; 64 x 512 floats are 128 KiB of L2
constexpr int64_t kDirectQueries = 2;   // up to here packing costs as many exponentials as it saves
constexpr int64_t kSerialWork = 30000;  // tanh below which a second thread costs more than it saves

// scores of queries x 4 keys. q [groups][kGroup][queries][kLanes], k
// [groups][kGroup][kKeys][2][kLanes], v [groups][kGroup][kLanes].
template <int queries>
inline void score_tile(const float* q, const float* k, const float* v, int64_t groups, vf* score) {
  vf sums[queries * kKeys] = {};
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
    for (int t = 0; t < queries; ++t)
#pragma GCC unroll 4
      for (int s = 0; s < kKeys; ++s) {
        vf& sum = sums[t * kKeys + s];
        for (int i = 0; i < kGroup; ++i) {
          const float* y = k + (i * kKeys + s) * 2 * kLanes;
          const vf n = fma(load(q + (i * queries + t) * kLanes), load(y), load(y + kLanes));
          sum = fma(load(v + i * kLanes), n / (n + set1(2.0f)), sum);
        }
      }
    q += kGroup * queries * kLanes;
    k += kGroup * kKeys * 2 * kLanes;
    v += kGroup * kLanes;
  }
  for (int i = 0; i < queries * kKeys; ++i) score[i] = sums[i];
}

// The lanes' sum rounded once: a score of 20 rounded at every step of a float sum is 2e-6 off,
// which the softmax hands on. 2 to 8 % of a tile.
inline float sum_wide(vf v) {
  typedef double vd __attribute__((vector_size(8 * kLanes)));
  const vd wide = __builtin_convertvector(v, vd);
  double total[4] = {};
  for (int i = 0; i < kLanes; i += 4)
    for (int j = 0; j < 4; ++j) total[j] += wide[i + j];
  return static_cast<float>((total[0] + total[2]) + (total[1] + total[3]));
}

inline float score_direct(const float* q, const float* k, const float* v, int64_t D) {
  vf acc = zero();
  for (int64_t d = 0; d < D; d += kLanes)
    acc = fma(load_at_most(v + d, D - d),
              tanh(load_at_most(q + d, D - d) + load_at_most(k + d, D - d)), acc);
  return sum_wide(acc);
}

// What one piece of work owns.
struct Workspace {
  Scratch memory;
  float* query;         // a of up to kChunk queries, in blocks of kQueries, 2 and 1: see score_tile
  float* key;           // y and b of up to kChunk keys, in blocks of kKeys filled up with 0
  float* shift;         // [padded_D]
  float* row;           // [round_up(S, kLanes)], in the memory of the panels
  float bound[kChunk];  // of q + shift, for each query

  Workspace(const AdditiveAttentionInputs& in, int64_t padded_D)
      : Workspace(std::min<int64_t>(in.T, kChunk), std::min<int64_t>(round_up(in.S, kKeys), kChunk),
                  padded_D, round_up(in.S, kLanes)) {}

 private:
  Workspace(int64_t query_rows, int64_t key_rows, int64_t padded_D, int64_t padded_S)
      : memory(sizeof(float) * std::max((query_rows + 2 * key_rows + 1) * padded_D, padded_S)),
        query(memory.as<float>()),
        key(query + query_rows * padded_D),
        shift(key + 2 * key_rows * padded_D),
        row(query) {}
};

class Forward {
 public:
  // v [padded_D], 0 from D on.
  Forward(const AdditiveAttentionForward& args, const float* v, int64_t padded_D)
      : args_(args), in_(args.in), v_(v), padded_D_(padded_D) {}

  // Scores of keys [s0, s1) of batch element b for every query, into `weights`.
  void scores(Workspace& work, int64_t b, int64_t s0, int64_t s1) const {
    s1 = std::min(s1, key_count(in_, b));
    if (s0 >= s1) return;
    const float* k = in_.key + b * in_.key_stride_b + s0 * in_.key_stride_s;
    const bool factored =
        in_.T > kDirectQueries && key_shift(k, in_.key_stride_s, s1 - s0, in_.D, work.shift);
    if (factored) pack_keys(work, k, s1 - s0);
    for (int64_t t0 = 0; t0 < in_.T; t0 += kChunk) {
      const int64_t t1 = std::min(in_.T, t0 + kChunk);
      if (factored) {
        pack_queries(work, b, t0, t1);
      } else {
        std::fill_n(work.bound, t1 - t0, std::numeric_limits<float>::infinity());
      }
      for (int64_t s = s0; s < s1; s += kKeys) {
        const float* panel = work.key + (s - s0) * 2 * padded_D_;
        const Tiles tiles{b, t0, t1, s, static_cast<int>(std::min<int64_t>(kKeys, s1 - s)), panel};
        int64_t t = score_tiles<kQueries>(work, tiles, t0);
        if constexpr (kQueries > 2) t = score_tiles<2>(work, tiles, t);
        if constexpr (kQueries > 1) t = score_tiles<1>(work, tiles, t);
      }
    }
  }

  // Softmax over the scores of queries [t0, t1), at most kRowBlock, then their context.
  void finish(Workspace& work, int64_t b, int64_t t0, int64_t t1) const {
    const int64_t S = key_count(in_, b);
    bool empty[kRowBlock];
    for (int64_t t = t0; t < t1; ++t) empty[t - t0] = !softmax(work.row, b, t, S);
    float* context = args_.context + (b * in_.T + t0) * in_.E;
    matmul(t1 - t0, S, in_.E, score_row(b, t0), in_.S, 1, in_.value + b * in_.value_stride_b,
           in_.value_stride_s, context, in_.E);
    // 0 times an infinite value is NaN, but a query with nothing to attend to has context 0.
    for (int64_t i = 0; i < t1 - t0; ++i)
      if (empty[i]) std::fill_n(context + i * in_.E, in_.E, 0.0f);
  }

 private:
  // Queries [t0, t1) against `keys` keys from s on, packed at `panel`.
  struct Tiles {
    int64_t b, t0, t1, s;
    int keys;
    const float* panel;
  };

  float* score_row(int64_t b, int64_t t) const { return args_.weights + (b * in_.T + t) * in_.S; }

  bool attends(const Tiles& tiles, int64_t t, int queries) const {
    if (in_.mask == nullptr) return true;
    const uint8_t* m = in_.mask + tiles.b * in_.mask_stride_b + t * in_.mask_stride_t +
                       tiles.s * in_.mask_stride_s;
    for (int i = 0; i < queries; ++i)
      for (int j = 0; j < tiles.keys; ++j)
        if (m[i * in_.mask_stride_t + j * in_.mask_stride_s]) return true;
    return false;
  }

  void pack_keys(Workspace& work, const float* k, int64_t count) const {
    for (int64_t s = 0; s < round_up(count, kKeys); ++s)
      pack_key(k + s * in_.key_stride_s, work.shift, s < count ? in_.D : 0, padded_D_,
               work.key + (s / kKeys * kKeys * padded_D_ + s % kKeys * kLanes) * 2,
               kKeys * 2 * kLanes);
  }

  void pack_queries(Workspace& work, int64_t b, int64_t t0, int64_t t1) const {
    const float* q = in_.query + b * in_.query_stride_b;
    int block = kQueries;
    for (int64_t t = t0; t < t1; t += block) {
      while (block > t1 - t) block /= 2;
      for (int i = 0; i < block; ++i) {
        const float* row = q + (t + i) * in_.query_stride_t;
        work.bound[t - t0 + i] = query_bound(row, work.shift, in_.D);
        pack_query(row, work.shift, in_.D, padded_D_,
                   work.query + (t - t0) * padded_D_ + i * kLanes, block * kLanes);
      }
    }
  }

  // As many tiles of `queries` rows as fit from t on; returns the first row left over.
  template <int queries>
  int64_t score_tiles(Workspace& work, const Tiles& tiles, int64_t t) const {
    for (; t + queries <= tiles.t1; t += queries) {
      if (!attends(tiles, t, queries)) continue;
      float bound = work.bound[t - tiles.t0];
      for (int i = 1; i < queries; ++i) bound = std::max(bound, work.bound[t - tiles.t0 + i]);
      if (bound > kFactoredLimit) {
        for (int i = 0; i < queries; ++i)
          for (int j = 0; j < tiles.keys; ++j)
            score_row(tiles.b, t + i)[tiles.s + j] = score_direct(
                in_.query + tiles.b * in_.query_stride_b + (t + i) * in_.query_stride_t,
                in_.key + tiles.b * in_.key_stride_b + (tiles.s + j) * in_.key_stride_s, in_.v,
                in_.D);
        continue;
      }
      const float* q = work.query + (t - tiles.t0) * padded_D_;
      const int64_t groups = padded_D_ / (kGroup * kLanes);
      vf score[queries * kKeys];
      score_tile<queries>(q, tiles.panel, v_, groups, score);
      for (int i = 0; i < queries; ++i)
        for (int j = 0; j < tiles.keys; ++j)
          score_row(tiles.b, t + i)[tiles.s + j] = sum_wide(score[i * kKeys + j]);
    }
    return t;
  }

  // false if the row has nothing to attend to. `padded` holds round_up(S, kLanes) floats.
  bool softmax(float* padded, int64_t b, int64_t t, int64_t S) const {
    constexpr float kMasked = -std::numeric_limits<float>::infinity();
    float* row = score_row(b, t);
    bool any = S > 0;
    if (in_.mask == nullptr) {
      std::copy_n(row, S, padded);
    } else {
      any = false;
      const uint8_t* m = in_.mask + b * in_.mask_stride_b + t * in_.mask_stride_t;
      for (int64_t s = 0; s < S; ++s) {
        const bool attend = m[s * in_.mask_stride_s] != 0;
        padded[s] = attend ? row[s] : kMasked;
        any |= attend;
      }
    }
    if (!any) {
      std::fill_n(row, in_.S, 0.0f);
      return false;
    }
    const int64_t padded_S = round_up(S, kLanes);
    std::fill(padded + S, padded + padded_S, kMasked);
    vf largest = set1(kMasked);
    for (int64_t s = 0; s < padded_S; s += kLanes) largest = max(load(padded + s), largest);
    const vf top = set1(max_lane(largest));
    vf total = zero();
    for (int64_t s = 0; s < padded_S; s += kLanes) {
      const vf x = load(padded + s);
      const vf e = x == set1(kMasked) ? zero() : exp(x - top);
      store(padded + s, e);
      total = total + e;
    }
    const vf divisor = set1(sum(total));
    for (int64_t s = 0; s < padded_S; s += kLanes) {
      // A masked weight stays 0 beside a NaN; exp never returns 0.
      const vf e = load(padded + s);
      store(padded + s, e == zero() ? zero() : e / divisor);
    }
    std::copy_n(padded, S, row);
    std::fill(row + S, row + in_.S, 0.0f);
    return true;
  }

  const AdditiveAttentionForward& args_;
  const AdditiveAttentionInputs& in_;
  const float* v_;
  int64_t padded_D_;
};

}  // namespace

void additive_attention_fwd(const AdditiveAttentionForward& args, int num_threads) {
  const AdditiveAttentionInputs& in = args.in;
  const int64_t padded_D = round_up(in.D, kGroup * kLanes);
  const Scratch memory(sizeof(float) * padded_D);
  float* v = memory.as<float>();
  std::copy_n(in.v, in.D, v);
  std::fill(v + in.D, v + padded_D, 0.0f);

  const Forward forward(args, v, padded_D);
  const int64_t key_chunks = (in.S + kChunk - 1) / kChunk;
  const int64_t chunk =
      key_chunks == 0 ? kChunk : round_up((in.S + key_chunks - 1) / key_chunks, kKeys);
  const int64_t query_chunks = (in.T + kRowBlock - 1) / kRowBlock;
  if (in.B * in.T * in.S * in.D < kSerialWork) num_threads = 1;

  const auto score_piece = [&](Workspace& work, int64_t b, int64_t i) {
    forward.scores(work, b, i * chunk, std::min(in.S, (i + 1) * chunk));
  };
  const auto finish_piece = [&](Workspace& work, int64_t b, int64_t i) {
    forward.finish(work, b, i * kRowBlock, std::min(in.T, (i + 1) * kRowBlock));
  };
  if (num_threads == 1 || in.B >= 2 * num_threads) {
    parallel_for(num_threads, in.B, 1, [&](int64_t b0, int64_t b1) {
      Workspace work(in, padded_D);
      for (int64_t b = b0; b < b1; ++b) {
        for (int64_t i = 0; i < key_chunks; ++i) score_piece(work, b, i);
        for (int64_t i = 0; i < query_chunks; ++i) finish_piece(work, b, i);
      }
    });
    return;
  }
  parallel_for(num_threads, in.B * key_chunks, 1, [&](int64_t i0, int64_t i1) {
    Workspace work(in, padded_D);
    for (int64_t i = i0; i < i1; ++i) score_piece(work, i / key_chunks, i % key_chunks);
  });
  parallel_for(num_threads, in.B * query_chunks, 1, [&](int64_t i0, int64_t i1) {
    Workspace work(in, padded_D);
    for (int64_t i = i0; i < i1; ++i) finish_piece(work, i / query_chunks, i % query_chunks);
  });
}

}  // namespace mbm::MBM_ISA
