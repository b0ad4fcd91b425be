// Forward: scores tile by tile into `weights`, then softmax and context per block of queries.
#include <algorithm>
#include <limits>

#include "additive_attention/additive_attention.h"
#include "additive_attention/score_tile.h"
#include "additive_attention/tanh_forms.h"
#include "common/hidden_pairs.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/small_matmul.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int64_t kQueryChunk = 64;  // queries packed at a time; 64 x 512 are 256 KiB, for L2
constexpr int64_t kGroup = 16;       // keys packed at a time
constexpr int64_t kRowBlock = kLanes == 16 ? 8 : 4;  // queries whose context is one piece of work
constexpr int64_t kKeyPiece = 64;       // keys of a piece of work where batch elements are few
constexpr int64_t kSerialWork = 30000;  // tanh below which a second thread costs more than it saves

// Keys for several forwards: [B][tiles][pairs][kKeys][2][kLanes], then max |k| of each key,
// [B][tiles][kKeys], since a forward may end within a tile.
struct PackedKeys {
  int64_t tiles, tile_size, count;

  PackedKeys(int64_t B, int64_t S, int64_t D)
      : tiles((S + kKeys - 1) / kKeys), tile_size(kKeys * round_up(D, kPair)), count(B * tiles) {}
  int64_t size() const { return count * (tile_size + kKeys); }
  int64_t at(int64_t tile) const { return tile * tile_size; }
  int64_t magnitudes_at(int64_t tile) const { return count * tile_size + tile * kKeys; }
};

inline float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// Up to kKeys keys of batch element b from s on, and max |k| of each; those from `end` on count as
// 0.
template <ScoreForm form>
void pack_keys(const AdditiveAttentionInputs& in, int64_t b, int64_t s, int64_t end, float* out,
               float* magnitudes) {
  for (int j = 0; j < kKeys; ++j) {
    const bool inside = s + j < end;
    const float* row = in.key + b * in.key_stride_b + (inside ? s + j : s) * in.key_stride_s;
    magnitudes[j] = pack_key<form>(row, inside ? in.D : 0, round_up(in.D, kPair), out, j);
  }
}

// What one piece of work owns.
struct Workspace {
  Scratch memory;
  float* query;  // up to kQueryChunk queries, in blocks of kQueries, 2 and 1: see score_tile
  float* key;    // kGroup keys: 16 x 512 are 32 KiB, which the queries of a block meet in L1
  float* row;    // [round_up(S, kLanes)], in the memory of the panels
  float magnitude[kQueryChunk];  // max |q|, for each query
  float key_magnitude[kGroup];   // max |k|, for each key

  Workspace(const AdditiveAttentionInputs& in, int64_t padded_D)
      : Workspace(std::min<int64_t>(in.T, kQueryChunk), padded_D, round_up(in.S, kLanes)) {}

 private:
  Workspace(int64_t query_rows, int64_t padded_D, int64_t padded_S)
      : memory(sizeof(float) * std::max(2 * (query_rows + kGroup) * padded_D, padded_S)),
        query(memory.as<float>()),
        key(query + 2 * query_rows * padded_D),
        row(query) {}
};

class Forward {
 public:
  Forward(const AdditiveAttentionForward& args, const PackedV& v)
      : args_(args),
        in_(args.in),
        v_(v),
        padded_D_(v.pairs * kPair),
        packed_(in_.B, in_.S, in_.D) {}

  // Scores of keys [s0, s1) of batch element b for every query, into `weights`.
  void scores(Workspace& work, int64_t b, int64_t s0, int64_t s1) const {
    const int64_t count = key_count(in_, b);
    s1 = std::min(s1, count);
    if (s0 >= s1) return;
    for (int64_t t0 = 0; t0 < in_.T; t0 += kQueryChunk) {
      const int64_t t1 = std::min(in_.T, t0 + kQueryChunk);
      if (is_small(b, t0, t1, count)) {
        score_keys<ScoreForm::kSmall>(work, b, t0, t1, s0, s1);
      } else if (v_.precise) {
        score_keys<ScoreForm::kDifference>(work, b, t0, t1, s0, s1);
      } else {
        score_keys<ScoreForm::kRatio>(work, b, t0, t1, s0, s1);
      }
    }
  }

  // Softmax over the scores of queries [t0, t1), at most kRowBlock, then their context.
  void finish(Workspace& work, int64_t b, int64_t t0, int64_t t1) const {
    const int64_t S = key_count(in_, b);
    for (int64_t t = t0; t < t1; ++t) softmax(work.row, b, t, S);
    float* context = args_.context + (b * in_.T + t0) * in_.E;
    const float* value = in_.value + b * in_.value_stride_b;
    matmul(t1 - t0, S, in_.E, score_row(b, t0), in_.S, value, in_.value_stride_s, context, in_.E);
    if (in_.mask != nullptr && any_special(t1 - t0, in_.E, context, in_.E))
      without_hidden_pairs(t1 - t0, S, in_.E, score_row(b, t0), in_.S, value, in_.value_stride_s,
                           context, in_.E,
                           [&](int64_t i, int64_t s) { return attends(b, t0 + i, 1, s, 1); });
  }

 private:
  // Queries [t0, t1) against the keys [s0, s1), packed tile after tile.
  struct Group {
    int64_t b, t0, t1, s0, s1;
    const float *packed, *magnitudes;  // the latter one for each key
  };

  float* score_row(int64_t b, int64_t t) const { return args_.weights + (b * in_.T + t) * in_.S; }

  bool attends(int64_t b, int64_t t, int queries, int64_t s, int keys) const {
    if (in_.mask == nullptr) return true;
    const uint8_t* m =
        in_.mask + b * in_.mask_stride_b + t * in_.mask_stride_t + s * in_.mask_stride_s;
    for (int i = 0; i < queries; ++i)
      for (int j = 0; j < keys; ++j)
        if (m[i * in_.mask_stride_t + j * in_.mask_stride_s]) return true;
    return false;
  }

  const float* query_row(int64_t b, int64_t t) const {
    return in_.query + b * in_.query_stride_b + t * in_.query_stride_t;
  }
  const float* key_row(int64_t b, int64_t s) const {
    return in_.key + b * in_.key_stride_b + s * in_.key_stride_s;
  }

  // max |k| of the keys [0, count).
  float largest_key(int64_t b, int64_t count) const {
    if (args_.packed_key == nullptr)
      return max_magnitude(key_row(b, 0), in_.key_stride_s, count, in_.D);
    return max_magnitude(args_.packed_key + packed_.magnitudes_at(b * packed_.tiles), 0, 1, count);
  }

  // Whether queries [t0, t1) need relative accuracy against the keys [0, count), and get it.
  bool is_small(int64_t b, int64_t t0, int64_t t1, int64_t count) const {
    if (!v_.precise) return false;
    const float query = max_magnitude(query_row(b, t0), in_.query_stride_t, t1 - t0, in_.D);
    return query <= kSmallScore && query + largest_key(b, count) <= kSmallScore;
  }

  template <ScoreForm form>
  void score_keys(Workspace& work, int64_t b, int64_t t0, int64_t t1, int64_t s0,
                  int64_t s1) const {
    pack_queries<form>(work, b, t0, t1);
    // A block of queries that is alone meets each key but once.
    const int64_t keys = t1 - t0 <= kQueries ? kKeys : kGroup;
    for (int64_t s = s0; s < s1; s += keys) {
      Group group{b, t0, t1, s, std::min(s1, s + keys), work.key, work.key_magnitude};
      Ahead ahead = fetch_ahead(group, s1);
      if (form != ScoreForm::kSmall && args_.packed_key != nullptr) {
        const int64_t tile = b * packed_.tiles + s / kKeys;
        group.packed = args_.packed_key + packed_.at(tile);
        group.magnitudes = args_.packed_key + packed_.magnitudes_at(tile);
      } else {
        for (int64_t i = 0; s + i * kKeys < group.s1; ++i)
          pack_keys<form>(in_, b, s + i * kKeys, group.s1, work.key + i * key_size<form>(),
                          work.key_magnitude + i * kKeys);
      }
      int64_t t = score_queries<form, kQueries>(work, group, t0, &ahead);
      if constexpr (kQueries > 2) t = score_queries<form, 2>(work, group, t, &ahead);
      if constexpr (kQueries > 1) t = score_queries<form, 1>(work, group, t, &ahead);
    }
  }

  // The keys of the next group, and the values of this one, which finish() will read: where rows
  // lie one after another, and are asked for once.
  Ahead fetch_ahead(const Group& group, int64_t s1) const {
    Ahead ahead{in_.v, in_.v, 0, 0};
    if (args_.packed_key == nullptr && in_.key_stride_s == in_.D && group.s1 < s1) {
      ahead.key = key_row(group.b, group.s1);
      ahead.key_step = 32;
    }
    if (in_.value_stride_s == in_.E && group.t0 == 0) {
      ahead.value = in_.value + group.b * in_.value_stride_b + group.s0 * in_.value_stride_s;
      ahead.value_step = 32;
    }
    return ahead;
  }

  template <ScoreForm form>
  void pack_queries(Workspace& work, int64_t b, int64_t t0, int64_t t1) const {
    constexpr int64_t kStep = query_vectors(form) * kLanes;
    int block = kQueries;
    for (int64_t t = t0; t < t1; t += block) {
      while (block > t1 - t) block /= 2;
      for (int i = 0; i < block; ++i) {
        float* out = work.query + (t - t0) * query_size<form>() + i * kStep;
        const auto put = [&](int64_t pair, int half, vf x) {
          float* to = out + pair * block * kStep + half * kLanes;
          if constexpr (form == ScoreForm::kSmall) {
            store(to, expm1(x + x));
          } else {
            const vf e = exp_in_range(set1(-2.0f) * x);
            store(to, e);
            store(to + 2 * kLanes,
                  set1(form == ScoreForm::kRatio ? -2.0f : -1.0f) * v_.vector(pair, half) * e);
          }
        };
        work.magnitude[t - t0 + i] = pack_row(query_row(b, t + i), in_.D, padded_D_, put);
      }
    }
  }

  template <ScoreForm form>
  int64_t query_size() const {
    return padded_D_ * query_vectors(form) / 2;
  }

  template <ScoreForm form>
  int64_t key_size() const {
    return padded_D_ * kKeys * key_vectors(form) / 2;
  }

  // As many blocks of `queries` rows as fit from t on; returns the first row left over.
  template <ScoreForm form, int queries>
  int64_t score_queries(Workspace& work, const Group& group, int64_t t, Ahead* ahead) const {
    for (; t + queries <= group.t1; t += queries) {
      const float* q = work.query + (t - group.t0) * query_size<form>();
      float query_magnitude = 0.0f;
      for (int i = 0; i < queries; ++i)
        query_magnitude = larger_or_nan(query_magnitude, work.magnitude[t - group.t0 + i]);
      for (int64_t i = 0; group.s0 + i * kKeys < group.s1; ++i) {
        const int64_t s = group.s0 + i * kKeys;
        const int keys = static_cast<int>(std::min<int64_t>(kKeys, group.s1 - s));
        if (!attends(group.b, t, queries, s, keys)) continue;
        float key_magnitude = 0.0f;
        for (int j = 0; j < keys; ++j)
          key_magnitude = larger_or_nan(key_magnitude, group.magnitudes[i * kKeys + j]);
        float score[queries * kKeys];
        if (v_.factorable && query_magnitude + key_magnitude <= kRatioLimit) {
          vf lanes[queries * kKeys];
          score_tile<form, queries>(q, group.packed + i * key_size<form>(), v_.data(), v_.pairs,
                                    lanes, ahead);
          sum_wide<queries * kKeys>(lanes, score);
        } else {
          for (int j = 0; j < queries; ++j)
            for (int l = 0; l < keys; ++l)
              score[j * kKeys + l] =
                  score_direct(query_row(group.b, t + j), key_row(group.b, s + l), in_.v, in_.D);
        }
        for (int j = 0; j < queries; ++j)
          std::copy_n(score + j * kKeys, keys, score_row(group.b, t + j) + s);
      }
    }
    return t;
  }

  // Scores to weights in place. `padded` holds round_up(S, kLanes) floats.
  void softmax(float* padded, int64_t b, int64_t t, int64_t S) const {
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
      return;
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
  }

  const AdditiveAttentionForward& args_;
  const AdditiveAttentionInputs& in_;
  const PackedV& v_;
  int64_t padded_D_;
  PackedKeys packed_;
};

}  // namespace

int64_t additive_attention_packed_key_size(int64_t B, int64_t S, int64_t D) {
  return PackedKeys(B, S, D).size();
}

void additive_attention_pack_key(const AdditiveAttentionInputs& in, float* out, int num_threads) {
  const PackedKeys packed(in.B, in.S, in.D);
  if (in.B * in.S * in.D < kSerialWork) num_threads = 1;
  parallel_for(num_threads, packed.count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      pack_keys<ScoreForm::kRatio>(in, tile / packed.tiles, tile % packed.tiles * kKeys, in.S,
                                   out + packed.at(tile), out + packed.magnitudes_at(tile));
  });
}

void additive_attention_fwd(const AdditiveAttentionForward& args, int num_threads) {
  const AdditiveAttentionInputs& in = args.in;
  const PackedV v(in.v, in.D);
  const int64_t padded_D = v.pairs * kPair;
  const int64_t key_chunks = (in.S + kKeyPiece - 1) / kKeyPiece;
  const int64_t chunk =
      key_chunks == 0 ? kKeyPiece : round_up((in.S + key_chunks - 1) / key_chunks, kKeys);
  const int64_t query_chunks = (in.T + kRowBlock - 1) / kRowBlock;
  if (in.B * in.T * in.S * in.D < kSerialWork) num_threads = 1;

  const Forward forward(args, v);

  const auto finish_piece = [&](Workspace& work, int64_t b, int64_t i) {
    forward.finish(work, b, i * kRowBlock, std::min(in.T, (i + 1) * kRowBlock));
  };
  if (num_threads == 1 || in.B >= 2 * num_threads) {
    parallel_for(num_threads, in.B, 1, [&](int64_t b0, int64_t b1) {
      Workspace work(in, padded_D);
      for (int64_t b = b0; b < b1; ++b) {
        forward.scores(work, b, 0, in.S);
        for (int64_t i = 0; i < query_chunks; ++i) finish_piece(work, b, i);
      }
    });
    return;
  }
  parallel_for(num_threads, in.B * key_chunks, 1, [&](int64_t i0, int64_t i1) {
    Workspace work(in, padded_D);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t s = i % key_chunks * chunk;
      forward.scores(work, i / key_chunks, s, std::min(in.S, s + chunk));
    }
  });
  parallel_for(num_threads, in.B * query_chunks, 1, [&](int64_t i0, int64_t i1) {
    Workspace work(in, padded_D);
    for (int64_t i = i0; i < i1; ++i) finish_piece(work, i / query_chunks, i % query_chunks);
  });
}

}  // namespace mbm::MBM_ISA
