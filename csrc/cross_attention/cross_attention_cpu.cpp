// Forward: block by block of queries of one head, scores, softmax and context while p is in L2.
#include "common/parallel.h"
#include "cross_attention/cross_attention.h"
#include "cross_attention/head_weights.h"

namespace mbm::MBM_ISA {
namespace {

// mean[s] becomes the mean over heads, which come in their order n = 0 .. N - 1.
inline void add_head(int64_t n, int64_t N, const float* p, int64_t S, float* mean) {
  const vf share = set1(1.0f / static_cast<float>(N));
  for (int64_t s = 0; s < S; s += kLanes) {
    const int64_t left = S - s;
    const int lanes = static_cast<int>(left < kLanes ? left : kLanes);
    vf sum = load_n(p + s, lanes);
    if (n > 0) sum = sum + load_n(mean + s, lanes);
    store_n(mean + s, n == N - 1 ? sum * share : sum, lanes);
  }
}

class Forward {
 public:
  Forward(const CrossAttentionForward& args, bool add_heads)
      : args_(args),
        in_(args.in),
        rows_(block_rows(in_)),
        weights_(in_),
        memory_(sizeof(float) * static_cast<size_t>(rows_ * (weights_.padded_S() + in_.D))),
        p_(memory_.as<float>()),
        query_(p_ + rows_ * weights_.padded_S()),
        add_heads_(add_heads) {}

  void block(int64_t b, int64_t n, int64_t t0, int64_t t1) {
    const int64_t rows = t1 - t0, S = in_.S, padded_S = weights_.padded_S();
    const int64_t count = weights_.key_count(b, n);
    copy_rows(in_.query, b, n, t0, rows, in_.D, query_);
    weights_.compute(b, n, t0, rows, count, query_, p_);
    weights_.product(b, n, t0, rows, count, in_.E, p_, padded_S, in_.value,
                     args_.context.at(b, n, t0), args_.context.stride_r);
    for (int64_t i = 0; i < rows; ++i) {
      const float* p = p_ + i * padded_S;
      if (args_.heads) std::copy_n(p, S, args_.heads + ((b * in_.N + n) * in_.T + t0 + i) * S);
      if (add_heads_) add_head(n, in_.N, p, S, args_.mean + (b * in_.T + t0 + i) * S);
    }
  }

 private:
  const CrossAttentionForward& args_;
  const CrossAttentionInputs& in_;
  int64_t rows_;
  HeadWeights weights_;
  Scratch memory_;
  float* p_;      // [rows, padded_S]
  float* query_;  // [rows, D]
  bool add_heads_;
};

}  // namespace

void cross_attention_fwd(const CrossAttentionForward& given, int num_threads) {
  CrossAttentionForward args = given;
  const CrossAttentionInputs& in = args.in;
  if (in.B * in.N * in.T * in.S * (in.D + in.E) < kSerialWork) num_threads = 1;
  // The mean is added up head by head where batch elements keep all threads busy, else from p.
  const bool by_element = args.mean && (num_threads == 1 || in.B >= 2 * num_threads);
  const bool own_heads = args.mean && !by_element && !args.heads;
  const Scratch heads(own_heads ? sizeof(float) * static_cast<size_t>(in.B * in.N * in.T * in.S)
                                : 0);
  if (own_heads) args.heads = heads.as<float>();

  const int64_t rows = block_rows(in), blocks = (in.T + rows - 1) / rows;
  const int64_t together = by_element ? in.N * blocks : 1;
  parallel_for(num_threads, in.B * in.N * blocks, together, [&](int64_t begin, int64_t end) {
    Forward forward(args, by_element);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, t = i % blocks * rows;
      forward.block(head / in.N, head % in.N, t, std::min(in.T, t + rows));
    }
  });
  if (!args.mean || by_element) return;
  parallel_for(num_threads, in.B * in.T, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t n = 0; n < in.N; ++n)
        add_head(n, in.N, args.heads + ((i / in.T * in.N + n) * in.T + i % in.T) * in.S, in.S,
                 args.mean + i * in.S);
  });
}

}  // namespace mbm::MBM_ISA
