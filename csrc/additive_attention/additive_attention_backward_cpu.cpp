// Backward: the gradient of the scores per block of queries, then query, key and v in one pass that
// recomputes tanh. Lanes run over d and work is cut by (b, block of d), so that no two pieces add
// to the same element; grad_v alone is summed afterwards, over b in order.
#include <algorithm>

#include "additive_attention/additive_attention.h"
#include "additive_attention/small_matmul.h"
#include "additive_attention/tanh_forms.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace mbm::MBM_ISA {
namespace {

constexpr int kKeys = 4;        // keys of a tile
constexpr int64_t kBlock = 32;  // d of a piece: two cache lines of each row
constexpr int kVectors = kBlock / kLanes;
constexpr int64_t kValueRows = 64;      // rows of grad_value in a piece
constexpr int64_t kSerialWork = 15000;  // tanh below which a second thread costs more than it saves

enum class Form {
  kSmall,     // |q| + |k| <= 0.5: factored, with 1 - tanh^2 as it stands, exact to half an eps
  kFactored,  // q + c <= 20
  kDirect     // anything
};
constexpr float kSmallLimit = 0.5f;

// One vector of d, every query, 4 keys. grad_score [T][kKeys]; query [T][2][kLanes] holds a, a + 1
// and key [kKeys][2][kLanes] y, b; in kDirect the inputs themselves in their first vector. Adds sum
// over s of g (1 - tanh^2) to grad_query [T][kLanes], writes that over t to grad_key
// [kKeys][kLanes], both times 1/4 in kFactored, and returns the sum of g tanh.
template <Form form>
inline vf gradient_tile(int64_t T, const float* grad_score, const float* query, float* grad_query,
                        const float* key, float* grad_key) {
  const vf one = set1(1.0f), two = set1(2.0f);
  vf y[kKeys], b[kKeys], sum_key[kKeys] = {}, weighted = zero();
  for (int s = 0; s < kKeys; ++s) {
    y[s] = load(key + 2 * s * kLanes);
    b[s] = load(key + (2 * s + 1) * kLanes);
  }
  for (int64_t t = 0; t < T; ++t) {
    const vf a = load(query + 2 * t * kLanes), x = load(query + (2 * t + 1) * kLanes);
    vf n[kKeys] = {}, inverse[kKeys] = {}, sum_query = zero(), sum_tanh = zero();
    if constexpr (form != Form::kDirect) {
#pragma GCC unroll 4
      for (int s = 0; s < kKeys; ++s) {
        n[s] = fma(a, y[s], b[s]);
        inverse[s] = one / (n[s] + two);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < kKeys; ++s) {
      const vf g = set1(grad_score[t * kKeys + s]);
      vf p;
      if constexpr (form == Form::kFactored) {
        // (1 - tanh^2) / 4 = x y / (n + 2)^2 keeps its digits where tanh is near -1 or 1.
        sum_tanh = fma(g, n[s] * inverse[s], sum_tanh);
        p = g * inverse[s] * inverse[s] * (x * y[s]);
      } else {
        // kDirect takes any argument, infinity included.
        vf slope;
        vf tanh = n[s] * inverse[s];
        if constexpr (form == Form::kDirect) {
          tanh = direct_tanh(a + y[s], &slope);
        } else {
          slope = one - tanh * tanh;
        }
        sum_tanh = fma(g, tanh, sum_tanh);
        p = g * slope;
      }
      sum_key[s] = sum_key[s] + p;
      sum_query = sum_query + p;
    }
    weighted = weighted + sum_tanh;
    store(grad_query + t * kLanes, load(grad_query + t * kLanes) + sum_query);
  }
  for (int s = 0; s < kKeys; ++s) store(grad_key + s * kLanes, sum_key[s]);
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
      matmul_transposed(
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
      const float mean = weighted_mean(row, weights, S);
      float* out = grad_scores_ + b * tiles_ * in_.T * kKeys + t * kKeys;
      for (int64_t s = 0; s < S; s += kKeys, out += in_.T * kKeys)
        for (int64_t j = 0; j < kKeys; ++j)
          out[j] = s + j < S ? weights[s + j] * (row[s + j] - mean) : 0.0f;
    }
  }

  // grad_query, grad_key and grad_v of b for the block of d that starts at d0.
  void query_key_v(int64_t b, int64_t d0) const {
    const int64_t S = key_count(in_, b), T = in_.T, padded_S = round_up(S, kKeys);
    const Scratch memory(sizeof(float) * kBlock * (3 * T + 3 * padded_S + 1));
    Block block;
    block.b = b;
    block.d0 = d0;
    block.width = std::min<int64_t>(kBlock, in_.D - d0);
    block.S = S;
    block.query = memory.as<float>();
    block.grad_query = block.query + 2 * kBlock * T;
    block.key = block.grad_query + kBlock * T;
    block.grad_key = block.key + 2 * kBlock * padded_S;
    float* shift = block.grad_key + kBlock * padded_S;
    const float* q = in_.query + b * in_.query_stride_b + d0;
    const float* k = in_.key + b * in_.key_stride_b + d0;
    const Form form = choose_form(q, k, S, block.width, shift);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t i = 0; i < kVectors; ++i) {
        const int64_t d = i * kLanes, left = block.width - d;
        const vf x = left > 0 ? load_at_most(q + t * in_.query_stride_t + d, left) : zero();
        float* panel = block.query + (i * T + t) * 2 * kLanes;
        vf a = x, a1 = zero();
        if (form != Form::kDirect) query_factors(x, load(shift + d), &a, &a1);
        store(panel, a);
        store(panel + kLanes, a1);
      }
    for (int64_t s = 0; s < padded_S; ++s)
      for (int64_t i = 0; i < kVectors; ++i) {
        const int64_t d = i * kLanes, left = s < S ? block.width - d : 0;
        const vf x = left > 0 ? load_at_most(k + s * in_.key_stride_s + d, left) : zero();
        float* panel = block.key + (i * padded_S + s) * 2 * kLanes;
        vf y = x, b = zero();
        if (form != Form::kDirect && s < S) key_factors(x, load(shift + d), &y, &b);
        store(panel, y);
        store(panel + kLanes, b);
      }
    switch (form) {
      case Form::kSmall: return gradients<Form::kSmall>(block);
      case Form::kFactored: return gradients<Form::kFactored>(block);
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
    matmul(S - s0, in_.T, in_.E, args_.weights + b * in_.T * in_.S + s0, 1, in_.S,
           args_.grad_context + b * args_.grad_context_stride_b, args_.grad_context_stride_t, out,
           in_.E);
    std::fill(out + (S - s0) * in_.E, out + (s1 - s0) * in_.E, 0.0f);
  }

 private:
  // The inputs of gradient_tile for `width` d from d0 on, [kVectors] of each; key for padded S.
  struct Block {
    int64_t b, d0, width, S;
    float *query, *grad_query, *key, *grad_key;
  };

  // Also fills shift [kBlock].
  Form choose_form(const float* q, const float* k, int64_t S, int64_t width, float* shift) const {
    std::fill_n(shift, kBlock, 0.0f);
    if (S == 0) return Form::kSmall;
    if (!key_shift(k, in_.key_stride_s, S, width, shift)) return Form::kDirect;
    float bound = 0.0f, largest_query = 0.0f, largest_key = 0.0f;
    for (int64_t t = 0; t < in_.T; ++t) {
      bound = std::max(bound, query_bound(q + t * in_.query_stride_t, shift, width));
      largest_query = std::max(largest_query, max_magnitude(q + t * in_.query_stride_t, width));
    }
    if (bound > kFactoredLimit) return Form::kDirect;
    if (largest_query > kSmallLimit) return Form::kFactored;
    for (int64_t s = 0; s < S; ++s)
      largest_key = std::max(largest_key, max_magnitude(k + s * in_.key_stride_s, width));
    return largest_query + largest_key <= kSmallLimit ? Form::kSmall : Form::kFactored;
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
    return sum == 0.0 ? 0.0f
                      : static_cast<float>(
                            ((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) / sum);
  }

  bool any_gradient(const float* grad_score) const {
    for (int64_t i = 0; i < in_.T * kKeys; ++i)
      if (grad_score[i] != 0.0f) return true;
    return false;
  }

  template <Form form>
  void gradients(const Block& block) const {
    const int64_t T = in_.T, S = block.S, padded_S = round_up(S, kKeys);
    const int vectors = static_cast<int>((block.width + kLanes - 1) / kLanes);
    const float* grad_score = grad_scores_ + block.b * tiles_ * T * kKeys;
    vf grad_v[kVectors] = {};
    std::fill_n(block.grad_query, kBlock * T, 0.0f);
    for (int64_t s = 0; s < S; s += kKeys, grad_score += T * kKeys) {
      const bool skip = in_.mask != nullptr && !any_gradient(grad_score);
      for (int i = 0; i < vectors; ++i) {
        float* grad_key = block.grad_key + (i * padded_S + s) * kLanes;
        if (skip) {
          std::fill_n(grad_key, kKeys * kLanes, 0.0f);
          continue;
        }
        grad_v[i] =
            grad_v[i] + gradient_tile<form>(T, grad_score, block.query + i * 2 * T * kLanes,
                                            block.grad_query + i * T * kLanes,
                                            block.key + (i * padded_S + s) * 2 * kLanes, grad_key);
      }
    }
    for (int i = 0; i < vectors; ++i) {
      const int64_t d = block.d0 + i * kLanes;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, in_.D - d));
      const vf scale = load_n(in_.v + d, n) * set1(form == Form::kFactored ? 4.0f : 1.0f);
      if (args_.grad_query != nullptr)
        for (int64_t t = 0; t < T; ++t)
          store_n(args_.grad_query + (block.b * T + t) * in_.D + d,
                  load(block.grad_query + (i * T + t) * kLanes) * scale, n);
      if (args_.grad_key != nullptr)
        for (int64_t s = 0; s < in_.S; ++s)
          store_n(args_.grad_key + (block.b * in_.S + s) * in_.D + d,
                  s < S ? load(block.grad_key + (i * padded_S + s) * kLanes) * scale : zero(), n);
      store_n(grad_v_parts_ + block.b * in_.D + d, grad_v[i], n);
    }
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
