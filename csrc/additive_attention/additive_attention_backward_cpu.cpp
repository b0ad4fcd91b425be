// Backward: the gradient of the scores per block of queries, then query, key and v in one pass that
// recomputes tanh. Lanes run over d and work is cut by (b, block of d), so that no two pieces add
// to the same element; grad_v alone is summed afterwards, over b in order.
#include <algorithm>
#include <cmath>

#include "additive_attention/additive_attention.h"
#include "additive_attention/tanh_forms.h"
#include "common/hidden_pairs.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/small_matmul.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kKeys = 4;         // keys of a tile
constexpr int64_t kBlock = 128;  // d of a piece: long enough runs of each row for the prefetcher
constexpr int kVectors = kBlock / kLanes;
constexpr int64_t kSampleKeys = 8;      // keys whose mean decides a sign
constexpr int64_t kValueRows = 64;      // rows of grad_value in a piece
constexpr int64_t kSerialWork = 15000;  // tanh below which a second thread costs more than it saves

enum class Form {
  kSmall,  // |q| + |k| <= 1: 1 - tanh^2 as it stands, which costs 1.3 bits at most
  kRatio,  // |q| + |k| <= kRatioLimit
  kDirect  // anything
};
constexpr float kSmallLimit = 1.0f;

// One vector of d, every query, 4 keys. grad_score [T][kKeys]; query [T][kLanes] and y hold e^2x in
// kRatio, of inputs times their sign (`choose_signs`), a with y and b in kSmall, the inputs
// themselves in kDirect. Adds sum over s of g (1 - tanh^2) to grad_query [T][kLanes], that over t
// to sum_key, both quartered in kRatio, and returns the sum of g tanh; in kRatio that of g / (x y +
// 1), which is half of (sum of g) less it.
template <Form form>
inline vf gradient_tile(int64_t T, const float* grad_score, const float* query, float* grad_query,
                        const vf* y, const vf* b, vf* sum_key) {
  const vf one = set1(1.0f);
  vf weighted = zero();
  for (int64_t t = 0; t < T; ++t) {
    const vf a = load(query + t * kLanes);
    vf sum_query = zero(), sum_tanh = zero();
#pragma GCC unroll 2
    for (int s = 0; s < kKeys; s += 2) {
      vf value[2] = {}, inverse[2] = {};  // x y or m, and 1 / (value + 1): one division for two
      if constexpr (form != Form::kDirect) {
        vf d[2];
        for (int j = 0; j < 2; ++j) {
          value[j] = form == Form::kSmall ? fma(a, y[s + j], b[s + j]) : a * y[s + j];
          d[j] = value[j] + one;
        }
        const vf shared = one / (d[0] * d[1]);
        inverse[0] = shared * d[1];
        inverse[1] = shared * d[0];
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if constexpr (form == Form::kDirect)
          if (grad_score[t * kKeys + s + j] == 0.0f) continue;  // hidden: a or y may be a NaN
        const vf g = set1(grad_score[t * kKeys + s + j]);
        vf p;
        if constexpr (form == Form::kRatio) {
          // (1 - tanh^2) / 4 = x y / (x y + 1)^2 keeps its digits where tanh is near -1 or 1.
          const vf scaled = product_of(g, inverse[j]);
          sum_tanh = sum_tanh + scaled;
          p = product_of(scaled, inverse[j] * value[j]);
        } else {
          vf slope, tanh = value[j] * inverse[j];
          if constexpr (form == Form::kDirect) {
            tanh = direct_tanh(a + y[s + j], &slope);
          } else {
            slope = one - tanh * tanh;
          }
          sum_tanh = fma(g, tanh, sum_tanh);
          p = product_of(g, slope);
        }
        sum_key[s + j] = sum_key[s + j] + p;
        sum_query = sum_query + p;
      }
    }
    weighted = weighted + sum_tanh;
    store(grad_query + t * kLanes, load(grad_query + t * kLanes) + sum_query);
  }
  return weighted;
}

class Backward {
 public:
  // grad_scores [B][key tiles][T][kKeys]; grad_v_parts [B][D]: one row for each batch element.
  Backward(const AdditiveAttentionBackward& args, float* grad_scores, float* grad_v_parts)
      : args_(args),
        in_(args.in),
        grad_scores_(grad_scores),
        grad_v_parts_(grad_v_parts),
        tiles_((in_.S + kKeys - 1) / kKeys) {}

  // weights * (g - sum of weights * g) with g = grad_context value^T + grad_weights, for the
  // queries [t0, t1), at most kDotRows of them; keys past the length are left out, those of a tile
  // are 0.
  void score_gradient(int64_t b, int64_t t0, int64_t t1) const {
    const int64_t S = key_count(in_, b);
    const Scratch memory(sizeof(float) * kDotRows * (S + kKeys));
    float* g = memory.as<float>();
    const float* value = in_.value + b * in_.value_stride_b;
    if (args_.grad_context != nullptr) {
      matmul_nt(
          t1 - t0, S, in_.E,
          args_.grad_context + b * args_.grad_context_stride_b + t0 * args_.grad_context_stride_t,
          args_.grad_context_stride_t, value, in_.value_stride_s, g, S);
    } else {
      std::fill_n(g, (t1 - t0) * S, 0.0f);
    }
    for (int64_t t = t0; t < t1; ++t) {
      float* row = g + (t - t0) * S;
      const float* weights = args_.weights + (b * in_.T + t) * in_.S;
      if (args_.grad_weights != nullptr)
        add(row,
            args_.grad_weights + b * args_.grad_weights_stride_b + t * args_.grad_weights_stride_t,
            S);
      float mean = weighted_mean(row, weights, S);
      const bool spoilt = in_.mask != nullptr && !std::isfinite(mean);
      if (spoilt) {  // a hidden g may be the cause
        for (int64_t s = 0; s < S; ++s)
          if (!attends(b, t, s)) row[s] = 0.0f;
        mean = weighted_mean(row, weights, S);
      }
      float* out = grad_scores_ + b * tiles_ * in_.T * kKeys + t * kKeys;
      for (int64_t s = 0; s < S; s += kKeys, out += in_.T * kKeys)
        for (int64_t j = 0; j < kKeys; ++j)
          out[j] = s + j < S && !(spoilt && !attends(b, t, s + j))
                       ? weights[s + j] * (row[s + j] - mean)
                       : 0.0f;
    }
  }

  // grad_query, grad_key and grad_v of b for the block of d that starts at d0.
  void query_key_v(int64_t b, int64_t d0) const {
    const int64_t S = key_count(in_, b), T = in_.T;
    const Scratch memory(sizeof(float) * kBlock * 2 * T);
    Block block;
    block.b = b;
    block.d0 = d0;
    block.width = std::min<int64_t>(kBlock, in_.D - d0);
    block.S = S;
    block.query = memory.as<float>();
    block.grad_query = block.query + kBlock * T;
    const float* q = in_.query + b * in_.query_stride_b + d0;
    const float* k = in_.key + b * in_.key_stride_b + d0;
    const Form form = choose_form(q, k, S, block.width);
    if (form == Form::kRatio) choose_signs(q, k, &block);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t i = 0; i < kVectors; ++i) {
        const int64_t d = i * kLanes, left = block.width - d;
        vf x = left > 0 ? load_part(q + t * in_.query_stride_t + d, left) : zero();
        if (form == Form::kSmall) x = expm1(x + x);
        if (form == Form::kRatio) x = exp_in_range((x + x) * block.sign[i]);
        store(block.query + (i * T + t) * kLanes, x);
      }
    switch (form) {
      case Form::kSmall: return gradients<Form::kSmall>(block);
      case Form::kRatio: return gradients<Form::kRatio>(block);
      case Form::kDirect: return gradients<Form::kDirect>(block);
    }
  }

  // Rows [s0, s1) of weights^T grad_context; 0 past the length.
  void value(int64_t b, int64_t s0, int64_t s1) const {
    const int64_t S = std::max(s0, std::min(s1, key_count(in_, b)));
    float* out = args_.grad_value + (b * in_.S + s0) * in_.E;
    if (args_.grad_context == nullptr) {
      std::fill_n(out, (s1 - s0) * in_.E, 0.0f);
      return;
    }
    const float* g = args_.grad_context + b * args_.grad_context_stride_b;
    int64_t g_stride = args_.grad_context_stride_t;
    const bool spoilt = in_.mask != nullptr && any_special(in_.T, in_.E, g, g_stride);
    const Scratch read(spoilt ? sizeof(float) * static_cast<size_t>(in_.T * in_.E) : 0);
    if (spoilt) {
      for (int64_t t = 0; t < in_.T; ++t)
        if (attends_to_any(b, t))
          std::copy_n(g + t * g_stride, in_.E, read.as<float>() + t * in_.E);
        else
          std::fill_n(read.as<float>() + t * in_.E, in_.E, 0.0f);
      g = read.as<float>(), g_stride = in_.E;
    }
    matmul_tn(S - s0, in_.T, in_.E, args_.weights + b * in_.T * in_.S + s0, in_.S, g, g_stride, out,
              in_.E);
    std::fill(out + (S - s0) * in_.E, out + (s1 - s0) * in_.E, 0.0f);
  }

 private:
  // `width` d from d0 on: what gradient_tile takes of the queries, for each of kVectors.
  struct Block {
    int64_t b, d0, width, S;
    float *query, *grad_query;
    vf sign[kVectors];
  };

  // 1 or -1 for each d, so that sign (q + k) is mostly above 0. The sum of g (1 - 2 / (x y + 1))
  // has the rounding of 2 / (x y + 1), which is below 1 there, and up to 2 where tanh is below 0;
  // tanh is odd, and its slope even.
  void choose_signs(const float* q, const float* k, Block* block) const {
    const int64_t keys = std::min(block->S, kSampleKeys);
    const vf share =
        set1(static_cast<float>(in_.T) / static_cast<float>(std::max<int64_t>(keys, 1)));
    for (int i = 0; i < kVectors; ++i) {
      const int64_t d = i * kLanes, left = block->width - d;
      vf queries = zero(), sampled = zero();
      if (left > 0) {
        for (int64_t t = 0; t < in_.T; ++t)
          queries = queries + load_part(q + t * in_.query_stride_t + d, left);
        for (int64_t s = 0; s < keys; ++s)
          sampled = sampled + load_part(k + s * in_.key_stride_s + d, left);
      }
      block->sign[i] = fma(share, sampled, queries) < zero() ? set1(-1.0f) : set1(1.0f);
    }
  }

  Form choose_form(const float* q, const float* k, int64_t S, int64_t width) const {
    const float bound = max_magnitude(q, in_.query_stride_t, in_.T, width) +
                        max_magnitude(k, in_.key_stride_s, S, width);
    if (bound <= kSmallLimit) return Form::kSmall;
    return bound <= kRatioLimit ? Form::kRatio : Form::kDirect;  // direct with a NaN
  }

  bool attends(int64_t b, int64_t t, int64_t s) const {
    return in_.mask[b * in_.mask_stride_b + t * in_.mask_stride_t + s * in_.mask_stride_s] != 0;
  }
  bool attends_to_any(int64_t b, int64_t t) const {
    for (int64_t s = 0; s < key_count(in_, b); ++s)
      if (attends(b, t, s)) return true;
    return false;
  }

  static int64_t key_tiles(int64_t S) { return (S + kKeys - 1) / kKeys; }
  static float sum_of(const float* x, int64_t n) {
    double total = 0.0;
    for (int64_t i = 0; i < n; i += kKeys) total += (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
    return static_cast<float>(total);
  }
  static void add(float* y, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] += x[i];
  }
  // sum of w g / sum of w. Weights sum to 1 but for rounding, which would reach the gradients as a
  // sum over keys that is not 0; the double keeps it out.
  static float weighted_mean(const float* g, const float* w, int64_t n) {
    double weighted[4] = {}, total[4] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int j = 0; j < 4; ++j) {
        weighted[j] += static_cast<double>(w[i + j]) * g[i + j];
        total[j] += w[i + j];
      }
    for (; i < n; ++i) {
      weighted[0] += static_cast<double>(w[i]) * g[i];
      total[0] += w[i];
    }
    const double sum = (total[0] + total[1]) + (total[2] + total[3]);
    // 0: nothing to attend to, and every w is 0.
    return static_cast<float>(((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) /
                              (sum == 0.0 ? 1.0 : sum));
  }

  bool any_gradient(const float* grad_score) const {
    for (int64_t i = 0; i < in_.T * kKeys; ++i)
      if (grad_score[i] != 0.0f) return true;
    return false;
  }

  template <Form form>
  void gradients(const Block& block) const {
    const int64_t T = in_.T, S = block.S;
    const int vectors = static_cast<int>((block.width + kLanes - 1) / kLanes);
    const float* grad_score = grad_scores_ + block.b * tiles_ * T * kKeys;
    vf grad_v[kVectors] = {}, scale[kVectors] = {};
    const vf total =
        form == Form::kRatio ? set1(sum_of(grad_score, key_tiles(S) * T * kKeys)) : zero();
    for (int i = 0; i < vectors; ++i)
      scale[i] = load_part(in_.v + block.d0 + i * kLanes, block.width - i * kLanes) *
                 set1(form == Form::kRatio ? 4.0f : 1.0f);
    std::fill_n(block.grad_query, kBlock * T, 0.0f);
    for (int64_t s = 0; s < S; s += kKeys, grad_score += T * kKeys) {
      const bool skip = in_.mask != nullptr && !any_gradient(grad_score);
      // Keys are taken and their gradients written tile by tile: rows a power of two apart share a
      // few sets of L1, and a pass over them alone waits for every line. All vectors of a tile's
      // keys come first, so that their misses and their exponentials overlap.
      vf y[kVectors][kKeys], b[kVectors][kKeys];
      if (!skip)
        for (int j = 0; j < kKeys; ++j)
          for (int i = 0; i < vectors; ++i) key_vector<form>(block, s + j, i, &y[i][j], &b[i][j]);
      for (int i = 0; i < vectors; ++i) {
        vf sum_key[kKeys] = {};
        if (!skip)
          grad_v[i] = grad_v[i] + gradient_tile<form>(T, grad_score, block.query + i * T * kLanes,
                                                      block.grad_query + i * T * kLanes, y[i], b[i],
                                                      sum_key);
        if (args_.grad_key != nullptr)
          for (int64_t j = 0; j < std::min<int64_t>(kKeys, S - s); ++j)
            store_part(grad_key_row(block, s + j) + i * kLanes, sum_key[j] * scale[i],
                       block.width - i * kLanes);
      }
    }
    if (args_.grad_key != nullptr)
      for (int64_t s = S; s < in_.S; ++s) std::fill_n(grad_key_row(block, s), block.width, 0.0f);
    for (int i = 0; i < vectors; ++i) {
      const int64_t d = block.d0 + i * kLanes;
      if (args_.grad_query != nullptr)
        for (int64_t t = 0; t < T; ++t)
          store_n(args_.grad_query + (block.b * T + t) * in_.D + d,
                  load(block.grad_query + (i * T + t) * kLanes) * scale[i], lanes_of(block, i));
      if (form == Form::kRatio) grad_v[i] = block.sign[i] * (total - set1(2.0f) * grad_v[i]);
      store_n(grad_v_parts_ + block.b * in_.D + d, grad_v[i], lanes_of(block, i));
    }
  }

  static int lanes_of(const Block& block, int i) {
    return static_cast<int>(std::min<int64_t>(kLanes, block.width - i * kLanes));
  }
  float* grad_key_row(const Block& block, int64_t s) const {
    return args_.grad_key + (block.b * in_.S + s) * in_.D + block.d0;
  }

  // y and b of vector i of key s; those of a key of 0 past the length, where g is 0.
  template <Form form>
  void key_vector(const Block& block, int64_t s, int i, vf* y, vf* b) const {
    vf k = zero();
    if (s < block.S)
      k = load_part(
          in_.key + block.b * in_.key_stride_b + s * in_.key_stride_s + block.d0 + i * kLanes,
          block.width - i * kLanes);
    *y = k;
    *b = set1(-1.0f);
    if constexpr (form == Form::kSmall) key_factors(k, y, b);
    if constexpr (form == Form::kRatio) *y = exp_in_range((k + k) * block.sign[i]);
  }

  const AdditiveAttentionBackward& args_;
  const AdditiveAttentionInputs& in_;
  float* grad_scores_;
  float* grad_v_parts_;
  int64_t tiles_;
};

}  // namespace

void additive_attention_bwd(const AdditiveAttentionBackward& args, int num_threads) {
  const AdditiveAttentionInputs& in = args.in;
  const bool scored =
      args.grad_query != nullptr || args.grad_key != nullptr || args.grad_v != nullptr;
  const int64_t score_blocks = scored ? (in.T + kDotRows - 1) / kDotRows : 0;
  const int64_t d_blocks = scored ? (in.D + kBlock - 1) / kBlock : 0;
  const int64_t value_blocks =
      args.grad_value != nullptr ? (in.S + kValueRows - 1) / kValueRows : 0;
  const int64_t tiles = (in.S + kKeys - 1) / kKeys;
  const int64_t scores = scored ? in.B * tiles * in.T * kKeys : 0;
  const Scratch memory(sizeof(float) * (scores + (scored ? in.B * in.D : 0)));
  float* grad_v_parts = memory.as<float>() + scores;
  const Backward backward(args, memory.as<float>(), grad_v_parts);
  if (in.B * in.T * in.S * in.D < kSerialWork) num_threads = 1;

  const auto score_piece = [&](int64_t b, int64_t i) {
    backward.score_gradient(b, i * kDotRows, std::min<int64_t>(in.T, (i + 1) * kDotRows));
  };
  const auto gradient_piece = [&](int64_t b, int64_t i) {
    if (i < d_blocks) return backward.query_key_v(b, i * kBlock);
    const int64_t s = (i - d_blocks) * kValueRows;
    backward.value(b, s, std::min(in.S, s + kValueRows));
  };
  const int64_t pieces = d_blocks + value_blocks;
  if (num_threads == 1 || in.B >= 2 * num_threads) {
    parallel_for(num_threads, in.B, 1, [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) {
        for (int64_t i = 0; i < score_blocks; ++i) score_piece(b, i);
        for (int64_t i = 0; i < pieces; ++i) gradient_piece(b, i);
      }
    });
  } else {
    parallel_for(num_threads, in.B * score_blocks, 1, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) score_piece(i / score_blocks, i % score_blocks);
    });
    parallel_for(num_threads, in.B * pieces, 1, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) gradient_piece(i / pieces, i % pieces);
    });
  }
  if (args.grad_v == nullptr) return;
  for (int64_t d = 0; d < in.D; ++d) {
    double total = 0.0;
    for (int64_t b = 0; b < in.B; ++b) total += grad_v_parts[b * in.D + d];
    args.grad_v[d] = static_cast<float>(total);
  }
}

}  // namespace mbm::MBM_ISA
