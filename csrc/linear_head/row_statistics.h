// max, sum exp((z - max) * scale) for up to two scales, and sum z of every row of a chunk of logits
// (linear_head.h), by blocks of classes whose shares are added in their order.
#pragma once

#include "common/activations.h"
#include "common/gemm_pack.h"
#include "common/scratch.h"

namespace mbm::MBM_ISA {

// A running maximum starts here rather than at -inf, so that -inf - max is -inf and not NaN.
constexpr float kNoLogit = -3.40282347e38f;

class BlockStatistics {
 public:
  BlockStatistics(int64_t blocks, int64_t panels, bool with_totals, float scale = 1.0f)
      : BlockStatistics(blocks, panels, with_totals, scale, scale) {}
  // Where the scales differ, sums(1) is that of the second.
  BlockStatistics(int64_t blocks, int64_t panels, bool with_totals, float scale, float second)
      : blocks_(blocks),
        stride_(panels * kPanel),
        with_totals_(with_totals),
        scales_{scale, second},
        sums_(scale != second ? 2 : 1),
        arrays_(1 + sums_ + (with_totals ? 1 : 0)),
        // The last block + 1 holds the rows' own values.
        data_(sizeof(float) * static_cast<size_t>((blocks + 1) * stride_ * arrays_)) {}

  // Of panel p of block b: z [classes, kPanel].
  void measure(const float* z, int64_t classes, int64_t b, int64_t p) {
    vf max0 = set1(kNoLogit), max1 = max0;
    for (int64_t v = 0; v < classes; ++v) {
      max0 = max(load(z + v * kPanel), max0);
      max1 = max(load(z + v * kPanel + kLanes), max1);
    }
    put(b, 0, p, max0, max1);
    for (int64_t i = 0; i < sums_; ++i) {
      const vf scale = set1(scales_[i]);
      vf sum0 = zero(), sum1 = zero();
      for (int64_t v = 0; v < classes; ++v) {
        sum0 = sum0 + exp_or_zero((load(z + v * kPanel) - max0) * scale);
        sum1 = sum1 + exp_or_zero((load(z + v * kPanel + kLanes) - max1) * scale);
      }
      put(b, 1 + i, p, sum0, sum1);
    }
    if (!with_totals_) return;
    vf sum0 = zero(), sum1 = zero();
    for (int64_t v = 0; v < classes; ++v) {
      sum0 = sum0 + load(z + v * kPanel);
      sum1 = sum1 + load(z + v * kPanel + kLanes);
    }
    put(b, arrays_ - 1, p, sum0, sum1);
  }

  // The rows of panel p, from all blocks. A row without a logit above -inf has sum NaN, as
  // log_softmax.
  void combine(int64_t p) {
    for (int64_t r = p * kPanel; r < (p + 1) * kPanel; r += kLanes) {
      vf most = set1(kNoLogit);
      for (int64_t b = 0; b < blocks_; ++b) most = max(load(array(b, 0) + r), most);
      const vi none = (vi)(most == set1(kNoLogit));
      store(maxima() + r, most);
      for (int64_t i = 0; i < sums_; ++i) {
        vf total = zero();
        for (int64_t b = 0; b < blocks_; ++b)
          total = fma(load(array(b, 1 + i) + r),
                      exp_or_zero((load(array(b, 0) + r) - most) * set1(scales_[i])), total);
        store(sums(i) + r, (vf)((vi)total | none));
      }
      if (!with_totals_) continue;
      vf total = zero();
      for (int64_t b = 0; b < blocks_; ++b) total = total + load(array(b, arrays_ - 1) + r);
      store(array(blocks_, arrays_ - 1) + r, total);
    }
  }

  float* maxima() const { return array(blocks_, 0); }
  // of exp((z - max) * scale)
  float* sums(int64_t i = 0) const { return array(blocks_, 1 + (i < sums_ ? i : 0)); }
  const float* totals() const { return array(blocks_, arrays_ - 1); }  // of z

 private:
  float* array(int64_t b, int64_t which) const {
    return data_.as<float>() + (b * arrays_ + which) * stride_;
  }
  void put(int64_t b, int64_t which, int64_t p, vf first, vf second) {
    float* at = array(b, which) + p * kPanel;
    store(at, first);
    store(at + kLanes, second);
  }

  int64_t blocks_, stride_;
  bool with_totals_;
  float scales_[2];
  int64_t sums_, arrays_;
  Scratch data_;
};

}  // namespace mbm::MBM_ISA
