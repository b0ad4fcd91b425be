#include <cmath>

#include "contrastive_loss/contrastive_loss.h"
#include "contrastive_loss/pairs.h"

namespace mbm::MBM_ISA {
namespace {

// Softmax along both dimensions. With s = |scale|, a logit is s x for x the product, or minus it
// where the scale is negative: differences from the largest x are exact where they are small.
class InfoNce : Pairs {
 public:
  InfoNce(const ContrastiveLoss& args, int num_threads)
      : Pairs(args, args.grad_image || args.grad_text || args.grad_scale, num_threads),
        differentiate_(args.grad_image || args.grad_text || args.grad_scale),
        s_(std::fabs(args.scale[0])),
        blocks_(chunk_.blocks().count, rows_.most_panels(), false, s_),
        per_row_(kFloat * 3 * static_cast<size_t>(stride())),
        per_text_(kFloat * 2 * static_cast<size_t>(args.B)) {
    for (int64_t i = args.B; i < stride(); ++i) pair()[i] = 0.0f;
  }

  void run() {
    for (int64_t c = 0; c < rows_.chunks; ++c) {
      const RowChunk rows(rows_, c);
      chunk_.load_rows(rows, false);
      for_blocks([&](int thread, int64_t b) { measure(rows, thread, b); });
      for_items(threads_.count, rows.panels, [&](int, int64_t p) { conclude(rows, p); });
    }
    const double loss = conclude_texts();
    if (a_.loss) a_.loss[0] = static_cast<float>(loss / (2.0 * static_cast<double>(a_.B)));
    if (differentiate_) backward();
    if (a_.grad_scale)
      a_.grad_scale[0] = static_cast<float>(total().by_scale * share() * (negative() ? -0.5 : 0.5));
    if (a_.grad_bias) a_.grad_bias[0] = 0.0f;  // softmax removes what is common
  }

 private:
  int64_t stride() const { return rows_.panels * kPanel; }
  float* row_top() const { return per_row_.as<float>(); }  // the largest x
  float* row_log() const { return row_top() + stride(); }  // log of the sum of e^(s (x - it))
  float* pair() const { return row_log() + stride(); }     // x of the pair
  float* text_top() const { return per_text_.as<float>(); }
  float* text_log() const { return text_top() + a_.B; }  // the sum itself until all rows are known
  bool negative() const { return a_.scale[0] < 0; }

  RowPanels signed_products(const RowChunk& rows, int thread, int64_t b) const {
    const RowPanels x = products(rows, thread, b);
    if (negative())
      for (int64_t p = 0; p < rows.panels; ++p)
        for (int64_t i = 0; i < texts(b) * kPanel; i += kLanes)
          store(x.at(p, 0) + i, -load(x.at(p, 0) + i));
    return x;
  }

  void measure(const RowChunk& rows, int thread, int64_t b) {
    const RowPanels x = signed_products(rows, thread, b);
    for (int64_t p = 0; p < rows.panels; ++p) blocks_.measure(x.at(p, 0), texts(b), b, p);
    measure_texts(rows, x, b);
    for_pairs(rows, b, [&](int64_t v, int64_t r, int64_t text) { pair()[text] = x(v, r); });
  }

  // The block's texts over the chunk's rows, joined with the chunks before.
  void measure_texts(const RowChunk& rows, RowPanels x, int64_t b) const {
    const int64_t v0 = first_text(b), count = texts(b);
    alignas(64) float lanes[kBlockClasses * kLanes];
    for (int64_t v = 0; v < count; ++v) store(lanes + v * kLanes, set1(kNoLogit));
    for (int64_t p = 0; p < rows.panels; ++p)
      for (int64_t v = 0; v < count; ++v) {
        const float* at = x.at(p, v);
        const vf most = max(load(at), load(lanes + v * kLanes));
        store(lanes + v * kLanes, max(load(at + kLanes), most));
      }
    for (int64_t v = 0; v < count; ++v) {
      const float here = max_lane(load(lanes + v * kLanes));
      float &top = text_top()[v0 + v], &sum = text_log()[v0 + v];
      if (rows.first == 0) {
        top = here;
        sum = 0.0f;
      } else if (here > top) {
        sum *= std::exp((top - here) * s_);
        top = here;
      }
      store(lanes + v * kLanes, zero());
    }
    const vf s = set1(s_);
    for (int64_t p = 0; p < rows.panels; ++p) {
      const int64_t live = rows.rows_of_panel(p);
      const vi live0 = lanes_below(live), live1 = lanes_below(live - kLanes);
      for (int64_t v = 0; v < count; ++v) {
        const float* at = x.at(p, v);
        const vf top = set1(text_top()[v0 + v]);
        const vf e0 = keep_lanes(exp_or_zero((load(at) - top) * s), live0);
        const vf e1 = keep_lanes(exp_or_zero((load(at + kLanes) - top) * s), live1);
        store(lanes + v * kLanes, load(lanes + v * kLanes) + (e0 + e1));
      }
    }
    for (int64_t v = 0; v < count; ++v) text_log()[v0 + v] += sum(load(lanes + v * kLanes));
  }

  // A panel's rows, from all blocks.
  void conclude(const RowChunk& rows, int64_t p) {
    blocks_.combine(p);
    const int64_t to = rows.first + p * kPanel;
    for (int64_t i = 0; i < kPanel; ++i) {
      row_top()[to + i] = blocks_.maxima()[p * kPanel + i];
      row_log()[to + i] = std::log(blocks_.sums()[p * kPanel + i]);
    }
  }

  // Sum of the losses of all rows and texts.
  double conclude_texts() const {
    double total = 0;
    for (int64_t i = 0; i < a_.B; ++i) {
      // As log_softmax where no logit is above -inf.
      text_log()[i] = text_top()[i] == kNoLogit ? NAN : std::log(text_log()[i]);
      total += row_log()[i] + (row_top()[i] - pair()[i]) * s_;
      total += text_log()[i] + (text_top()[i] - pair()[i]) * s_;
    }
    return total;
  }

  // The last chunk's products are still there.
  void backward() {
    for (int64_t c = rows_.chunks - 1; c >= 0; --c) {
      const RowChunk rows(rows_, c);
      const bool last = c == rows_.chunks - 1;
      if (!last || a_.grad_text) chunk_.load_rows(rows, a_.grad_text != nullptr);
      for_blocks([&](int thread, int64_t b) {
        const RowPanels x = last ? chunk_.block(thread, b) : signed_products(rows, thread, b);
        differentiate(rows, x, b);
        add_to_text(thread, b, x, !last);
      });
      write_image(rows);
    }
  }

  void differentiate(const RowChunk& rows, RowPanels x, int64_t b) {
    const float factor = static_cast<float>(0.5 * share() * a_.scale[0]);
    double by_scale = 0;
    for (int64_t p = 0; p < rows.panels; ++p)
      for (int64_t j = 0; j < kPanel; j += kLanes) by_scale += half_panel(rows, x, b, p, j, factor);
    sums_[static_cast<size_t>(b)].by_scale += by_scale;
    for_pairs(rows, b, [&](int64_t v, int64_t r, int64_t i) {
      // In float64, since a probability less 1 has few digits where it is almost 1.
      const double by_row = std::exp(double{pair()[i] - row_top()[i]} * s_ - row_log()[i]);
      const double by_text = std::exp(double{pair()[i] - text_top()[i]} * s_ - text_log()[i]);
      x(v, r) = static_cast<float>(factor * ((by_row - 1.0) + (by_text - 1.0)));
    });
  }

  // Products of kLanes rows become gradients, but for pairs. Returns what they bring to that of the
  // scale, as the mean of x over a softmax less the pair's, which loses no digits where they meet.
  double half_panel(const RowChunk& rows, RowPanels x, int64_t b, int64_t p, int64_t j,
                    float factor) const {
    const int64_t row = rows.first + p * kPanel + j, v0 = first_text(b);
    const vf s = set1(s_), f = set1(factor);
    const vf top = load(row_top() + row), log_sum = load(row_log() + row), own = load(pair() + row);
    vf sums = zero();
    float* at = x.at(p, 0) + j;
    for (int64_t v = 0; v < texts(b); ++v, at += kPanel) {
      const vf product = load(at);
      const vf text_max = set1(text_top()[v0 + v]), text_sum = set1(text_log()[v0 + v]);
      const vf by_row = exp_or_zero((product - top) * s - log_sum);
      const vf by_text = exp_or_zero((product - text_max) * s - text_sum);
      sums = fma(by_row, product - own, sums);
      sums = fma(by_text, product - set1(pair()[v0 + v]), sums);
      store(at, (by_row + by_text) * f);
    }
    return sum(keep_lanes(sums, lanes_below(rows.rows_of_panel(p) - j)));
  }

  bool differentiate_;
  float s_;
  BlockStatistics blocks_;
  Scratch per_row_, per_text_;
};

// A logistic loss for each image and text, whose gradient needs no other: one pass.
class SigLip : Pairs {
 public:
  SigLip(const ContrastiveLoss& args, int num_threads)
      : Pairs(args, args.grad_image || args.grad_text, num_threads),
        sloped_(args.grad_image || args.grad_text || args.grad_scale || args.grad_bias) {}

  void run() {
    for (int64_t c = 0; c < rows_.chunks; ++c) {
      const RowChunk rows(rows_, c);
      chunk_.load_rows(rows, a_.grad_text != nullptr);
      for_blocks([&](int thread, int64_t b) {
        const RowPanels x = products(rows, thread, b);
        sums_[static_cast<size_t>(b)].add(sloped_ ? block<true>(rows, x, b)
                                                  : block<false>(rows, x, b));
        add_to_text(thread, b, x, c > 0);
      });
      write_image(rows);
    }
    const BlockSums all = total();
    if (a_.loss) a_.loss[0] = static_cast<float>(all.loss / static_cast<double>(a_.B));
    if (a_.grad_scale) a_.grad_scale[0] = static_cast<float>(all.by_scale * share());
    if (a_.grad_bias) a_.grad_bias[0] = static_cast<float>(all.by_bias * share());
  }

 private:
  // Losses of a block; with slopes, its products become their gradients.
  template <bool slopes>
  BlockSums block(const RowChunk& rows, RowPanels x, int64_t b) const {
    BlockSums found;
    for (int64_t p = 0; p < rows.panels; ++p)
      for (int64_t j = 0; j < kPanel; j += kLanes)
        found.add(meets_pairs(rows, p, b) ? half_panel<slopes, true>(rows, x, b, p, j)
                                          : half_panel<slopes, false>(rows, x, b, p, j));
    return found;
  }

  // Of kLanes rows.
  template <bool slopes, bool with_pairs>
  BlockSums half_panel(const RowChunk& rows, RowPanels x, int64_t b, int64_t p, int64_t j) const {
    const vf scale = set1(a_.scale[0]), bias = set1(a_.bias ? a_.bias[0] : 0.0f);
    const vf factor = set1(static_cast<float>(share() * a_.scale[0]));
    const int64_t row = rows.first + p * kPanel + j;
    const vi text =
        (lane_numbers() + static_cast<int32_t>(row)) - static_cast<int32_t>(first_text(b));
    vf loss = zero(), by_scale = zero(), by_bias = zero();
    float* at = x.at(p, 0) + j;
    for (int64_t v = 0; v < texts(b); ++v, at += kPanel) {
      const vf product = load(at);
      vf wrong = fma(scale, product, bias);  // a pair's logit ought to be high, others' low
      vi sign{};
      if (with_pairs) {
        sign = (text == static_cast<int32_t>(v)) & static_cast<int32_t>(0x80000000);
        wrong = (vf)((vi)wrong ^ sign);
      }
      const Softplus term = softplus(wrong);
      loss = loss + term.value;
      if (!slopes) continue;
      const vf g = with_pairs ? (vf)((vi)term.slope ^ sign) : term.slope;
      by_scale = fma(g, product, by_scale);
      by_bias = by_bias + g;
      store(at, g * factor);
    }
    const vi live = lanes_below(rows.rows_of_panel(p) - j);
    BlockSums found;
    found.loss = sum(keep_lanes(loss, live));
    found.by_scale = sum(keep_lanes(by_scale, live));
    found.by_bias = sum(keep_lanes(by_bias, live));
    return found;
  }

  bool sloped_;
};

}  // namespace

void contrastive_loss(const ContrastiveLoss& args, int num_threads) {
  if (args.kind == ContrastiveKind::kInfoNce)
    InfoNce(args, num_threads).run();
  else
    SigLip(args, num_threads).run();
}

}  // namespace mbm::MBM_ISA
