#include <cmath>
#include <limits>

#include "common/tanh_slope.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "linear_head/linear_head.h"
#include "linear_head/row_statistics.h"

namespace mbm::MBM_ISA {
namespace {

class CrossEntropy {
 public:
  CrossEntropy(const LinearCrossEntropy& args, int num_threads)
      : a_(args),
        gradients_(args.grad_hidden || args.grad_weight || args.grad_bias),
        kept_(kept_rows(args.target, args.N, args.ignore_index)),
        rows_(kept_.data(), static_cast<int64_t>(kept_.size()),
              gradients_ ? kChunkBytes : kForwardBytes,
              gradients_ ? kFloat * args.V : forward_bytes_a_row(args.H)),
        threads_(num_threads),
        chunk_({args.V, args.H, args.hidden, args.weight, args.bias}, rows_, threads_, gradients_,
               args.grad_weight != nullptr),
        blocks_(chunk_.blocks().count, rows_.most_panels(), args.label_smoothing != 0),
        per_row_(kFloat * kPerRow * static_cast<size_t>(stride())),
        capped_(gradients_ && args.softcap != 0
                    ? kFloat * static_cast<size_t>(num_threads * kBlockClasses * kPanel)
                    : 0) {}

  void run() {
    if (a_.loss && a_.reduction == RowReduction::kNone)
      std::memset(a_.loss, 0, kFloat * static_cast<size_t>(a_.N));
    clear_gradients();
    double total = 0;
    for (int64_t c = 0; c < rows_.chunks; ++c) {
      const RowChunk rows(rows_, c);
      chunk_.load_rows(rows, a_.grad_weight != nullptr);
      for_items(threads_.count, chunk_.blocks().count,
                [&](int thread, int64_t b) { measure(rows, thread, b); });
      for_items(threads_.count, rows.panels, [&](int, int64_t p) { conclude(rows, p); });
      for (int64_t r = 0; r < rows.rows; ++r) {
        if (a_.reduction == RowReduction::kNone && a_.loss) a_.loss[rows.kept[r]] = losses()[r];
        total += losses()[r];
      }
      if (gradients_) backward(rows, c > 0);
    }
    if (!a_.loss || a_.reduction == RowReduction::kNone) return;
    if (a_.reduction == RowReduction::kMean) total /= static_cast<double>(rows_.count);
    a_.loss[0] = static_cast<float>(total);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);
  static constexpr int64_t kPerRow = 7;
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  int64_t stride() const { return rows_.most_panels() * kPanel; }
  float* row_array(int64_t i) const { return per_row_.as<float>() + i * stride(); }
  float* picked() const { return row_array(0); }  // the target's logit, NaN where that is no class
  float* losses() const { return row_array(1); }
  float* log_sums() const { return row_array(2); }  // of exp(z - max)
  float* on_softmax() const { return row_array(3); }
  float* target_gradients() const { return row_array(4); }
  float* on_all() const { return row_array(5); }
  float* picked_slopes() const { return row_array(6); }  // of the cap, at the target's logit

  void clear_gradients() const {
    const bool empty = rows_.count == 0;
    if (a_.grad_hidden && rows_.count < a_.N)
      std::memset(a_.grad_hidden, 0, kFloat * static_cast<size_t>(a_.N * a_.H));
    if (a_.grad_weight && empty)
      std::memset(a_.grad_weight, 0, kFloat * static_cast<size_t>(a_.V * a_.H));
    if (a_.grad_bias && empty) std::memset(a_.grad_bias, 0, kFloat * static_cast<size_t>(a_.V));
  }

  // Logits of a block of classes, and its share of every row's statistics. Where gradients follow,
  // the logits stay uncapped: a saturated one has lost its slope.
  void measure(const RowChunk& rows, int thread, int64_t b) {
    const int64_t v0 = chunk_.blocks().begin(b), classes = chunk_.blocks().end(b) - v0;
    const RowPanels z = chunk_.logits(thread, b);
    for (int64_t p = 0; p < rows.panels; ++p) {
      const float* panel = z.at(p, 0);
      if (a_.softcap != 0) panel = cap(thread, z.at(p, 0), classes);
      blocks_.measure(panel, classes, b, p);
      for (int64_t i = 0; i < rows.rows_of_panel(p); ++i) {
        const int64_t r = p * kPanel + i, v = a_.target[rows.kept[r]];
        if (!is_class(v, v0, v0 + classes)) continue;
        picked()[r] = panel[(v - v0) * kPanel + i];
        if (gradients_ && a_.softcap != 0) picked_slopes()[r] = exact_slope(z(v - v0, r));
      }
    }
  }

  // z [classes, kPanel] capped, in place or in a buffer of the thread.
  const float* cap(int thread, float* z, int64_t classes) const {
    float* out = gradients_ ? capped_.as<float>() + thread * kBlockClasses * kPanel : z;
    const vf c = set1(a_.softcap), inverse = set1(1.0f / a_.softcap);
    for (int64_t i = 0; i < classes * kPanel; i += kLanes)
      store(out + i, c * tanh(load(z + i) * inverse));
    return out;
  }
  float exact_slope(float logit) const {
    const double e = std::exp(-2.0 * std::abs(static_cast<double>(logit) / a_.softcap));
    return static_cast<float>(4 * e / ((1 + e) * (1 + e)));
  }

  // Losses of a panel's rows, and what their gradients are made of.
  void conclude(const RowChunk& rows, int64_t p) {
    blocks_.combine(p);
    const float s = a_.label_smoothing, classes = static_cast<float>(a_.V);
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t r = p * kPanel + i;
      if (i >= rows.rows_of_panel(p)) {  // columns past the last row
        log_sums()[r] = on_softmax()[r] = on_all()[r] = 0.0f;
        continue;
      }
      const bool known = is_class(a_.target[rows.kept[r]], 0, a_.V);
      if (!known) picked()[r] = kNan;
      const float log_sum = log_sums()[r] = std::log(blocks_.sums()[r]);
      const float max = blocks_.maxima()[r], lse = max + log_sum;
      float loss = log_sum + (max - picked()[r]);
      if (s != 0) loss = (1 - s) * loss + s * (log_sum + (max - blocks_.totals()[r] / classes));
      losses()[r] = loss + (a_.z_loss != 0 ? a_.z_loss * lse * lse : 0.0f);
      float share =
          a_.reduction == RowReduction::kMean ? 1.0f / static_cast<float>(rows_.count) : 1;
      if (a_.grad_loss)
        share *= a_.grad_loss[a_.reduction == RowReduction::kNone ? rows.kept[r] : 0];
      const double on_softmax_r = share * (1.0 + 2.0 * a_.z_loss * lse);
      const double smoothed = static_cast<double>(s) * share;
      on_softmax()[r] = known ? static_cast<float>(on_softmax_r) : kNan;
      on_all()[r] = static_cast<float>(smoothed / static_cast<double>(a_.V));
      // In float64, since p - 1 has few digits where p is almost 1.
      const double p_target = std::exp(static_cast<double>(picked()[r] - max) - log_sum);
      target_gradients()[r] = static_cast<float>(
          (on_softmax_r * p_target - (share - smoothed) - smoothed / static_cast<double>(a_.V)) *
          (a_.softcap != 0 ? static_cast<double>(picked_slopes()[r]) : 1.0));
    }
  }

  void backward(const RowChunk& rows, bool add) {
    for_items(threads_.count, chunk_.blocks().count, [&](int thread, int64_t b) {
      const RowPanels z = chunk_.block(thread, b);
      differentiate(rows, z, b);
      if (a_.grad_bias) chunk_.grad_bias(b, z, a_.grad_bias, add);
      if (a_.grad_weight) chunk_.grad_weight(thread, b, z, a_.grad_weight, add);
    });
    if (a_.grad_hidden) chunk_.grad_hidden(rows, a_.grad_hidden);
  }

  // Logits of a block become their gradients.
  void differentiate(const RowChunk& rows, RowPanels z, int64_t b) const {
    const int64_t v0 = chunk_.blocks().begin(b), classes = chunk_.blocks().end(b) - v0;
    const bool capped = a_.softcap != 0;
    const vf c = set1(a_.softcap), inverse = set1(capped ? 1.0f / a_.softcap : 0.0f);
    for (int64_t p = 0; p < rows.panels; ++p)
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        const int64_t r = p * kPanel + j;
        const vf max = load(blocks_.maxima() + r), log_sum = load(log_sums() + r);
        const vf on_softmax_r = load(on_softmax() + r);
        const vf base = load(on_all() + r);
        float* at = z.at(p, 0) + j;
        for (int64_t v = 0; v < classes; ++v) {
          vf logit = load(at + v * kPanel), slope = set1(1.0f);
          if (capped) {
            const TanhAndSlope t = tanh_and_slope(logit * inverse);
            logit = c * t.value;
            slope = t.slope;
          }
          vf g = fma(on_softmax_r, exp_or_zero((logit - max) - log_sum), -base);
          if (capped) g = g * slope;
          store(at + v * kPanel, g);
        }
      }
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t v = a_.target[rows.kept[r]];
      if (is_class(v, v0, v0 + classes)) z(v - v0, r) = target_gradients()[r];
    }
  }

  const LinearCrossEntropy& a_;
  bool gradients_;
  std::vector<int64_t> kept_;
  RowChunks rows_;
  HeadThreads threads_;
  HeadChunk chunk_;
  BlockStatistics blocks_;
  Scratch per_row_;
  Scratch capped_;  // of each thread, a panel of a block's logits
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& args, int num_threads) {
  CrossEntropy(args, num_threads).run();
}

}  // namespace mbm::MBM_ISA
