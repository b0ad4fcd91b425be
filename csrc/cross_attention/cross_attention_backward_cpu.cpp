// Backward: one head is one piece of work, so that grad_key and grad_value are added up without
// atomics, in the order of the queries.
#include <cmath>

#include "common/parallel.h"
#include "cross_attention/cross_attention.h"
#include "cross_attention/head_weights.h"

namespace mbm::MBM_ISA {
namespace {

class Backward {
 public:
  explicit Backward(const CrossAttentionBackward& args)
      : args_(args),
        in_(args.in),
        rows_(block_rows(in_)),
        weights_(in_),
        memory_(sizeof(float) *
                static_cast<size_t>(rows_ * (2 * weights_.padded_S() + in_.D + in_.E))),
        p_(memory_.as<float>()),
        grad_(p_ + rows_ * weights_.padded_S()),
        query_(grad_ + rows_ * weights_.padded_S()),
        grad_context_(query_ + rows_ * in_.D) {}

  void head(int64_t b, int64_t n) {
    const int64_t count = in_.T > 0 ? weights_.key_count(b, n) : 0;
    for (int64_t t = 0; t < in_.T; t += rows_) block(b, n, t, std::min(rows_, in_.T - t), count);
    clear(args_.grad_key, b, n, count, in_.D);
    clear(args_.grad_value, b, n, args_.grad_context.data ? count : 0, in_.E);
  }

 private:
  void block(int64_t b, int64_t n, int64_t t0, int64_t rows, int64_t count) {
    const int64_t padded_S = weights_.padded_S(), D = in_.D, E = in_.E;
    copy_rows(in_.query, b, n, t0, rows, D, query_);
    const float* p = p_;
    int64_t p_stride = padded_S;
    if (args_.heads) {
      p = args_.heads + ((b * in_.N + n) * in_.T + t0) * in_.S;
      p_stride = in_.S;
    } else {
      weights_.compute(b, n, t0, rows, count, query_, p_);
    }
    if (args_.grad_context.data) copy_rows(args_.grad_context, b, n, t0, rows, E, grad_context_);
    if (weights_.masked()) clear_empty(b, n, t0, rows, count);
    if (args_.grad_context.data) {
      if (args_.grad_value.data)
        matmul_tn(count, rows, E, p, p_stride, grad_context_, E, args_.grad_value.at(b, n, 0),
                  args_.grad_value.stride_r, t0 > 0);
    }
    if (!args_.grad_query.data && !args_.grad_key.data && !args_.grad_added) return;
    grad_scores(b, n, t0, rows, count, p, p_stride);
    if (args_.grad_query.data)
      weights_.product(b, n, t0, rows, count, D, grad_, padded_S, in_.key,
                       args_.grad_query.at(b, n, t0), args_.grad_query.stride_r);
    if (args_.grad_key.data)
      matmul_tn(count, rows, D, grad_, padded_S, query_, D, args_.grad_key.at(b, n, 0),
                args_.grad_key.stride_r, t0 > 0);
  }

  // A query with nothing to attend to is not read, nor the gradient of its context.
  void clear_empty(int64_t b, int64_t n, int64_t t0, int64_t rows, int64_t count) const {
    if (!any_special(rows, in_.D, query_, in_.D) &&
        !(args_.grad_context.data && any_special(rows, in_.E, grad_context_, in_.E)))
      return;
    for (int64_t i = 0; i < rows; ++i) {
      if (!weights_.attends_to_none(b, n, t0 + i, count)) continue;
      std::fill_n(query_ + i * in_.D, in_.D, 0.0f);
      std::fill_n(grad_context_ + i * in_.E, in_.E, 0.0f);
    }
  }

  // scale times the gradient of scale query . key + added, into grad_; itself into grad_added.
  void grad_scores(int64_t b, int64_t n, int64_t t0, int64_t rows, int64_t count, const float* p,
                   int64_t p_stride) const {
    const int64_t padded_S = weights_.padded_S();
    if (args_.grad_context.data)
      matmul_nt(rows, count, in_.E, grad_context_, in_.E, in_.value.at(b, n, 0), in_.value.stride_r,
                grad_, padded_S);
    else
      std::fill_n(grad_, rows * padded_S, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      float* out = nullptr;
      if (args_.grad_added) {
        out = args_.grad_added + ((b * in_.N + n) * in_.T + t0 + i) * in_.S;
        std::fill(out + count, out + in_.S, 0.0f);
      }
      const float* given = args_.grad_weights.data ? args_.grad_weights.at(b, n, t0 + i) : nullptr;
      grad_row(b, n, t0 + i, count, p + i * p_stride, given, grad_ + i * padded_S, out);
    }
  }

  // row, the gradient of p through the context, becomes that of the score: p (g - sum_s p g).
  void grad_row(int64_t b, int64_t n, int64_t t, int64_t count, const float* p, const float* given,
                float* row, float* out) const {
    std::fill(row + count, row + round_up(count, kLanes), 0.0f);
    float total = add_given(count, p, given, row);
    const bool spoilt = weights_.masked() && !std::isfinite(total);
    if (spoilt) {  // a hidden g may be the cause
      clear_hidden(b, n, t, count, row);
      total = add_given(count, p, nullptr, row);
    }
    const vf mean = set1(total), scale = set1(in_.scale);
    for (int64_t s = 0; s < count; s += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - s));
      const vf grad = load_n(p + s, lanes) * (load(row + s) - mean);
      if (out) store_n(out + s, grad, lanes);
      store(row + s, grad * scale);
    }
    if (!spoilt) return;
    clear_hidden(b, n, t, count, row);
    if (out) clear_hidden(b, n, t, count, out);
  }

  // row becomes g: itself and `given`. Returns sum_s p g.
  float add_given(int64_t count, const float* p, const float* given, float* row) const {
    const vf share = set1(args_.grad_weights_scale);
    vf sums = zero();
    for (int64_t s = 0; s < count; s += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - s));
      vf g = load(row + s);
      if (given) {
        g = fma(share, load_n(given + s, lanes), g);
        store(row + s, g);
      }
      sums = fma(load_n(p + s, lanes), g, sums);
    }
    return sum(sums);
  }

  void clear_hidden(int64_t b, int64_t n, int64_t t, int64_t count, float* row) const {
    for (int64_t s = 0; s < count; ++s)
      if (weights_.hidden(b, n, t, s)) row[s] = 0.0f;
  }

  void clear(const HeadRows<float>& out, int64_t b, int64_t n, int64_t from, int64_t width) const {
    if (!out.data) return;
    for (int64_t s = from; s < in_.S; ++s) std::fill_n(out.at(b, n, s), width, 0.0f);
  }

  const CrossAttentionBackward& args_;
  const CrossAttentionInputs& in_;
  int64_t rows_;
  HeadWeights weights_;
  Scratch memory_;
  float* p_;             // [rows, padded_S]
  float* grad_;          // [rows, padded_S]
  float* query_;         // [rows, D]
  float* grad_context_;  // [rows, E]
};

}  // namespace

void cross_attention_bwd(const CrossAttentionBackward& args, int num_threads) {
  const CrossAttentionInputs& in = args.in;
  if (in.B * in.N * in.T * in.S * (in.D + in.E) < kSerialWork / 2) num_threads = 1;
  parallel_for(num_threads, in.B * in.N, 1, [&](int64_t begin, int64_t end) {
    Backward backward(args);
    for (int64_t i = begin; i < end; ++i) backward.head(i / in.N, i % in.N);
  });
}

}  // namespace mbm::MBM_ISA
