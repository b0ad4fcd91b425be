// p of a block of queries of one head: scores, masks, softmax. Shared by forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/activations.h"
#include "common/hidden_pairs.h"
#include "common/scratch.h"
#include "common/small_matmul.h"
#include "cross_attention/cross_attention.h"

namespace mbm::MBM_ISA {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr int64_t kMostRows = 48;  // of a block: 48 x 64 of the queries are 12 KiB, for L1
constexpr int64_t kBlockFloats = 64 * 1024;  // of p of a block: 256 KiB, for L2
// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kSerialWork = 400000;

// Queries taken at once: an even cut of T, whole tiles of dot products.
inline int64_t block_rows(const CrossAttentionInputs& in) {
  const int64_t fitting = kBlockFloats / std::max<int64_t>(1, in.S);
  const int64_t most = std::min(std::max<int64_t>(fitting, 4), kMostRows);
  const int64_t blocks = std::max<int64_t>(1, (in.T + most - 1) / most);
  return round_up(std::max<int64_t>(1, (in.T + blocks - 1) / blocks), 4);
}

// Rows of `source` one after another, `width` floats each.
inline void copy_rows(const HeadRows<const float>& source, int64_t b, int64_t n, int64_t r0,
                      int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(source.at(b, n, r0 + r), width, out + r * width);
}

class HeadWeights {
 public:
  explicit HeadWeights(const CrossAttentionInputs& in)
      : in_(in),
        padded_S_(round_up(in.S, kLanes)),
        memory_(sizeof(float) * static_cast<size_t>(padded_S_)),
        bias_(memory_.as<float>()) {}

  int64_t padded_S() const { return padded_S_; }

  // Keys that count: those past it are hidden from every query of the head, and are skipped.
  int64_t key_count(int64_t b, int64_t n) const {
    int64_t count = in_.S;
    if (in_.key_lengths) count = std::min(in_.S, std::max<int64_t>(0, in_.key_lengths[b]));
    if (one_bias())
      while (count > 0 && hidden(b, n, 0, count - 1)) --count;
    return count;
  }

  // p of queries [t0, t0 + rows) into `p` [rows, padded_S()], 0 from `count` = key_count(b, n) on.
  // `query` are their rows, contiguous.
  void compute(int64_t b, int64_t n, int64_t t0, int64_t rows, int64_t count, const float* query,
               float* p) const {
    matmul_nt(rows, count, in_.D, query, in_.D, in_.key.at(b, n, 0), in_.key.stride_r, p,
              padded_S_);
    for (int64_t i = 0; i < rows; ++i) {
      if (masked() && (i == 0 || !one_bias())) fill_bias(b, n, t0 + i, count);
      float* row = p + i * padded_S_;
      softmax(row, count);
      std::fill(row + count, row + padded_S_, 0.0f);
    }
  }

  bool masked() const { return in_.mask.data || in_.added.data; }

  bool hidden(int64_t b, int64_t n, int64_t t, int64_t s) const {
    return in_.mask.data ? in_.mask.at(b, n, t)[s * in_.mask_stride_s] == 0
                         : in_.added.at(b, n, t)[s * in_.mask_stride_s] == kHidden;
  }
  bool attends_to_none(int64_t b, int64_t n, int64_t t, int64_t count) const {
    for (int64_t s = 0; s < count; ++s)
      if (!hidden(b, n, t, s)) return false;
    return true;
  }

  // out [rows, width] = w m for queries [t0, t0 + rows), where m, key or value of this head, may
  // hold anything in the pairs that a mask hides.
  void product(int64_t b, int64_t n, int64_t t0, int64_t rows, int64_t count, int64_t width,
               const float* w, int64_t w_stride, const HeadRows<const float>& m, float* out,
               int64_t out_stride) const {
    const float* from = m.at(b, n, 0);
    matmul(rows, count, width, w, w_stride, from, m.stride_r, out, out_stride);
    if (masked() && any_special(rows, width, out, out_stride))
      without_hidden_pairs(rows, count, width, w, w_stride, from, m.stride_r, out, out_stride,
                           [&](int64_t i, int64_t s) { return !hidden(b, n, t0 + i, s); });
  }

 private:
  bool one_bias() const {
    if (!masked()) return false;
    return in_.T == 1 || (in_.mask.data ? in_.mask.stride_r : in_.added.stride_r) == 0;
  }

  // What is added to the scores of query t.
  void fill_bias(int64_t b, int64_t n, int64_t t, int64_t count) const {
    const int64_t step = in_.mask_stride_s;
    if (in_.added.data) {
      const float* added = in_.added.at(b, n, t);
      for (int64_t s = 0; s < count; ++s) bias_[s] = added[s * step];
    } else if (step == 1) {
      const uint8_t* mask = in_.mask.at(b, n, t);
      for (int64_t s = 0; s < count; ++s) bias_[s] = mask[s] ? 0.0f : kHidden;
    } else {
      const uint8_t* mask = in_.mask.at(b, n, t);
      for (int64_t s = 0; s < count; ++s) bias_[s] = mask[s * step] ? 0.0f : kHidden;
    }
    std::fill(bias_ + count, bias_ + padded_S_, kHidden);
  }

  // A NaN beside a mask of -infinity stays hidden.
  vf biased(vf score, int64_t s) const {
    const vf x = score * set1(in_.scale);
    if (!masked()) return x;
    const vf bias = load(bias_ + s);
    return bias == set1(kHidden) ? bias : x + bias;
  }

  // Whether a query has something to attend to, by its bias_.
  bool attends(int64_t count) const {
    return !masked() ? count > 0
                     : std::any_of(bias_, bias_ + count, [](float x) { return x != kHidden; });
  }

  // Scores to weights in place; lanes past `count` become 0.
  void softmax(float* row, int64_t count) const {
    const int64_t padded = round_up(count, kLanes);
    vf largest = set1(kHidden);
    int64_t s = 0;
    for (; s + kLanes <= count; s += kLanes) {
      const vf x = biased(load(row + s), s);
      store(row + s, x);
      largest = max(x, largest);
    }
    if (s < count) {
      store(row + s, biased(load(row + s), s));
      std::fill(row + count, row + padded, kHidden);
      largest = max(load(row + s), largest);
    }
    const float top = max_lane(largest);  // without the NaN among them
    if (top == kHidden && !attends(count)) {
      std::fill(row, row + padded, 0.0f);
      return;
    }
    // e^-87 is the least normal float, and what exp() gives for anything below.
    const vf shift = set1(top), least = set1(-87.0f);
    vf sums = zero();
    for (s = 0; s < padded; s += kLanes) {
      const vf x = load(row + s) - shift;
      const vf e = x < least ? zero() : exp(x);
      store(row + s, e);
      sums = sums + e;
    }
    const float total = sum(sums);
    if (!(total > 0.0f)) {
      // A NaN or +infinity among the scores, or nothing but -infinity: all that is attended becomes
      // NaN, as in torch.
      for (s = 0; s < count; ++s)
        row[s] = masked() && bias_[s] == kHidden ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const vf inverse = set1(1.0f / total);
    for (s = 0; s < padded; s += kLanes) store(row + s, load(row + s) * inverse);
  }

  const CrossAttentionInputs& in_;
  int64_t padded_S_;
  Scratch memory_;
  float* bias_;  // [padded_S], of one query
};

}  // namespace
}  // namespace mbm::MBM_ISA
