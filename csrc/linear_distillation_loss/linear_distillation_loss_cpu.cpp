#include <cmath>
#include <limits>

#include "linear_distillation_loss/divergence.h"
#include "linear_distillation_loss/linear_distillation_loss.h"
#include "linear_distillation_loss/topk_bins.h"
#include "linear_head/linear_head.h"

namespace mbm::MBM_ISA {
namespace {

class Distillation {
 public:
  Distillation(const LinearDistillation& args, int num_threads)
      : a_(args),
        unit_(!args.grad_loss && !args.grad_hard && !args.grad_soft),
        gradients_(args.grad_hidden || args.grad_weight || args.grad_bias),
        soft_gradients_(gradients_ &&
                        (args.grad_soft || ((unit_ || args.grad_loss) && args.hard_weight != 1))),
        topk_(args.teacher == Teacher::kTopk),
        full_V_(topk_ ? 0 : args.V),
        kept_(kept_rows(args.target, args.N, args.ignore_index)),
        rows_(kept_.data(), static_cast<int64_t>(kept_.size()), kChunkBytes, kFloat * args.V),
        threads_(num_threads),
        student_({args.V, args.Hs, args.student_hidden, args.student_weight, args.student_bias},
                 rows_, threads_, true, args.grad_weight != nullptr),
        teacher_({full_V_, args.teacher == Teacher::kHidden ? args.Ht : 0, args.teacher_hidden,
                  args.teacher_weight, args.teacher_bias},
                 rows_, threads_, true, false),
        blocks_(student_.blocks()),
        student_stats_(blocks_.count, rows_.most_panels(), false, 1.0f, 1.0f / args.temperature),
        teacher_stats_(topk_ ? 0 : blocks_.count, rows_.most_panels(), false,
                       1.0f / args.temperature),
        rest_stats_(topk_ ? blocks_.count : 0, rows_.most_panels(), false),
        partial_(kFloat * static_cast<size_t>(2 * blocks_.count * stride())),
        per_row_(kFloat * static_cast<size_t>(kRowArrays * stride())),
        bins_(kFloat * static_cast<size_t>(topk_ ? 2 * stride() * args.k : 0)) {}

  void run() {
    float* const results[] = {a_.loss, a_.hard, a_.soft};
    for (float* result : results)
      if (result && none()) std::memset(result, 0, kFloat * static_cast<size_t>(a_.N));
    clear_gradients();
    double hard = 0, soft = 0;
    for (int64_t c = 0; c < rows_.chunks; ++c) {
      const RowChunk rows(rows_, c);
      evaluate(rows, c > 0);
      for (int64_t r = 0; r < rows.rows; ++r) {
        hard += array(kHard)[r];
        soft += array(kSoft)[r];
        if (none()) write(rows.kept[r], array(kHard)[r], array(kSoft)[r]);
      }
    }
    if (none()) return;
    const double count = a_.reduction == RowReduction::kMean ? static_cast<double>(rows_.count) : 1;
    write(0, hard / count, soft / count);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  enum {
    kPicked,
    kLogStudent,
    kLogQ,
    kLogP,
    kOnHard,
    kOnSoft,
    kMeanRatio,
    kHard,
    kSoft,
    kRest,
    kOnRest,
    kRowArrays
  };

  int64_t stride() const { return rows_.most_panels() * kPanel; }
  float* array(int64_t which) const { return per_row_.as<float>() + which * stride(); }
  float* partial(int64_t b, int64_t which) const {
    return partial_.as<float>() + (2 * b + which) * stride();
  }
  float* bin_logits(int64_t r) const { return bins_.as<float>() + r * a_.k; }
  float* bin_gradients(int64_t r) const { return bins_.as<float>() + (stride() + r) * a_.k; }
  bool none() const { return a_.reduction == RowReduction::kNone; }
  int64_t classes(int64_t b) const { return blocks_.end(b) - blocks_.begin(b); }

  void write(int64_t n, double hard, double soft) const {
    const double w = a_.hard_weight;
    // A term of weight 0 is left out, even where it is infinite.
    const double loss = w == 0 ? soft : w == 1 ? hard : w * hard + (1 - w) * soft;
    if (a_.loss) a_.loss[n] = static_cast<float>(loss);
    if (a_.hard) a_.hard[n] = static_cast<float>(hard);
    if (a_.soft) a_.soft[n] = static_cast<float>(soft);
  }

  void clear_gradients() const {
    const bool empty = rows_.count == 0;
    if (a_.grad_hidden && rows_.count < a_.N)
      std::memset(a_.grad_hidden, 0, kFloat * static_cast<size_t>(a_.N * a_.Hs));
    if (a_.grad_weight && empty)
      std::memset(a_.grad_weight, 0, kFloat * static_cast<size_t>(a_.V * a_.Hs));
    if (a_.grad_bias && empty) std::memset(a_.grad_bias, 0, kFloat * static_cast<size_t>(a_.V));
  }

  template <class Body>
  void each_block(const Body& body) {
    for_items(threads_.count, blocks_.count, body);
  }

  void evaluate(const RowChunk& rows, bool add) {
    student_.load_rows(rows, a_.grad_weight != nullptr);
    if (a_.teacher == Teacher::kHidden) teacher_.load_rows(rows, false);
    each_block([&](int thread, int64_t b) { measure(rows, thread, b); });
    for_items(threads_.count, rows.panels, [&](int, int64_t p) { conclude_hard(rows, p); });
    const bool summed_on_the_way = soft_gradients_ && a_.divergence == Divergence::kForwardKl;
    if (topk_) {
      evaluate_bins(rows);
    } else if (!summed_on_the_way) {
      each_block([&](int, int64_t b) {
        with_divergence([&](auto kind) { compare_block<kind.value>(rows, b); });
      });
      for_items(threads_.count, rows.panels, [&](int, int64_t p) { conclude_soft(p); });
    }
    if (!gradients_) return;
    if (topk_) {
      each_block([&](int thread, int64_t b) { differentiate_plain(rows, thread, b); });
      for_items(threads_.count, rows.panels, [&](int, int64_t p) { scatter_bins(rows, p); });
    }
    each_block([&](int thread, int64_t b) {
      if (!topk_) differentiate_block(rows, thread, b);
      const RowPanels g = student_.block(thread, b);
      for (int64_t r = 0; r < rows.rows; ++r) {
        const int64_t v = a_.target[rows.kept[r]], v0 = blocks_.begin(b);
        if (is_class(v, v0, blocks_.end(b))) g(v - v0, r) -= array(kOnHard)[r];
      }
      if (a_.grad_bias) student_.grad_bias(b, g, a_.grad_bias, add);
      if (a_.grad_weight) student_.grad_weight(thread, b, g, a_.grad_weight, add);
    });
    if (!topk_ && summed_on_the_way)
      for_items(threads_.count, rows.panels, [&](int, int64_t p) { conclude_soft(p); });
    if (a_.grad_hidden) student_.grad_hidden(rows, a_.grad_hidden);
  }

  // Both sides' logits of a block, and their shares of every row's statistics.
  void measure(const RowChunk& rows, int thread, int64_t b) {
    const RowPanels s = student_.logits(thread, b);
    for (int64_t p = 0; p < rows.panels; ++p) student_stats_.measure(s.at(p, 0), classes(b), b, p);
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t v = a_.target[rows.kept[r]], v0 = blocks_.begin(b);
      if (is_class(v, v0, blocks_.end(b))) array(kPicked)[r] = s(v - v0, r);
    }
    if (topk_) return;
    RowPanels t = teacher_.block(thread, b);
    if (a_.teacher == Teacher::kHidden)
      t = teacher_.logits(thread, b);
    else
      load_logits(rows, b, t);
    for (int64_t p = 0; p < rows.panels; ++p) teacher_stats_.measure(t.at(p, 0), classes(b), b, p);
  }

  void load_logits(const RowChunk& rows, int64_t b, RowPanels t) const {
    const float* at[kPanel];
    for (int64_t p = 0; p < rows.panels; ++p) {
      const int count = static_cast<int>(rows.rows_of_panel(p));
      for (int i = 0; i < kPanel; ++i)  // columns past the last row repeat it
        at[i] = a_.teacher_logits + rows.kept[p * kPanel + (i < count ? i : count - 1)] * a_.V;
      transpose_rows(Rows{nullptr, 0, at}, 0, kPanel, blocks_.begin(b), classes(b), t.at(p, 0),
                     kPanel);
    }
  }

  // Whether the target of row n and all ids of its teacher are classes.
  bool is_known(int64_t n) const {
    if (!is_class(a_.target[n], 0, a_.V)) return false;
    for (int64_t j = 0; topk_ && j < a_.k; ++j)
      if (!is_class(a_.topk_ids[n * a_.k + j], 0, a_.V)) return false;
    return true;
  }

  void conclude_hard(const RowChunk& rows, int64_t p) {
    student_stats_.combine(p);
    if (!topk_) teacher_stats_.combine(p);
    const float mean =
        a_.reduction == RowReduction::kMean ? 1 / static_cast<float>(rows_.count) : 1;
    for (int64_t r = p * kPanel; r < (p + 1) * kPanel; ++r) {
      const float log_sum = array(kLogStudent)[r] = std::log(student_stats_.sums()[r]);
      array(kLogQ)[r] = std::log(student_stats_.sums(1)[r]);
      if (!topk_) array(kLogP)[r] = std::log(teacher_stats_.sums()[r]);
      array(kOnHard)[r] = array(kOnSoft)[r] = array(kSoft)[r] = 0;
      if (r >= rows.rows) continue;
      array(kHard)[r] = log_sum + (student_stats_.maxima()[r] - array(kPicked)[r]);
      const int64_t n = none() ? rows.kept[r] : 0;
      const float on_loss = unit_ ? mean : a_.grad_loss ? a_.grad_loss[n] * mean : 0;
      array(kOnHard)[r] = on_loss * a_.hard_weight + (a_.grad_hard ? a_.grad_hard[n] * mean : 0);
      const float on_soft =
          on_loss * (1 - a_.hard_weight) + (a_.grad_soft ? a_.grad_soft[n] * mean : 0);
      const float slope =
          topk_ ? 1 : a_.temperature * (a_.divergence == Divergence::kJsd ? 1 - a_.beta : 1);
      array(kOnSoft)[r] = on_soft * slope;
      if (is_known(rows.kept[r])) continue;
      // By way of kLogP the divergence becomes NaN as well; of a top-k teacher see evaluate_bins.
      for (const int64_t which : {kHard, kOnHard, kOnSoft, kLogP}) array(which)[r] = kNan;
    }
  }

  RowTerms terms() const {
    return {student_stats_.maxima(),
            teacher_stats_.maxima(),
            array(kLogStudent),
            array(kLogQ),
            array(kLogP),
            array(kOnHard),
            array(kOnSoft),
            array(kMeanRatio),
            1 / a_.temperature,
            a_.beta};
  }

  template <class Body>
  void with_divergence(const Body& body) const {
    using std::integral_constant;
    switch (a_.divergence) {
      case Divergence::kForwardKl:
        return body(integral_constant<Divergence, Divergence::kForwardKl>());
      case Divergence::kReverseKl:
        return body(integral_constant<Divergence, Divergence::kReverseKl>());
      case Divergence::kJsd: return body(integral_constant<Divergence, Divergence::kJsd>());
    }
  }

  template <Divergence kind>
  void compare_block(const RowChunk& rows, int64_t b) {
    const RowPanels s = student_.block(0, b), t = teacher_.block(0, b);
    for (int64_t p = 0; p < rows.panels; ++p)
      compare<kind>(s.at(p, 0), t.at(p, 0), classes(b), terms(), p * kPanel,
                    partial(b, 0) + p * kPanel, partial(b, 1) + p * kPanel);
  }

  void differentiate_block(const RowChunk& rows, int thread, int64_t b) {
    if (!soft_gradients_) return differentiate_plain(rows, thread, b);
    const RowPanels s = student_.block(thread, b), t = teacher_.block(thread, b);
    with_divergence([&](auto kind) {
      for (int64_t p = 0; p < rows.panels; ++p)
        differentiate<kind.value>(s.at(p, 0), t.at(p, 0), classes(b), terms(), p * kPanel,
                                  partial(b, 0) + p * kPanel);
    });
  }

  void differentiate_plain(const RowChunk& rows, int thread, int64_t b) {
    const RowPanels s = student_.block(thread, b);
    const bool rest = topk_ && a_.k < a_.V && soft_gradients_;
    for (int64_t p = 0; p < rows.panels; ++p)
      differentiate_hard(s.at(p, 0), classes(b), terms(), p * kPanel, array(kOnRest),
                         rest ? array(kRest) : nullptr);
  }

  // The divergence of a panel's rows, from all blocks.
  void conclude_soft(int64_t p) {
    const double T = a_.temperature, beta = a_.beta;
    for (int64_t r = p * kPanel; r < (p + 1) * kPanel; ++r) {
      double first = 0, second = 0;
      for (int64_t b = 0; b < blocks_.count; ++b) {
        first += partial(b, 0)[r];
        if (a_.divergence == Divergence::kJsd) second += partial(b, 1)[r];
      }
      array(kMeanRatio)[r] = static_cast<float>(first);
      if (a_.divergence == Divergence::kJsd) first = beta * second + (1 - beta) * first;
      array(kSoft)[r] = static_cast<float>(T * T * first);
    }
  }

  // Top-k: the ids' logits are set aside while the statistics of all others are taken.
  void evaluate_bins(const RowChunk& rows) {
    const RowPanels z = student_.whole();
    const bool tail = a_.k < a_.V;
    for_items(threads_.count, rows.panels, [&](int, int64_t p) {
      for (int64_t i = 0; i < rows.rows_of_panel(p); ++i) {
        const int64_t r = p * kPanel + i, *ids = a_.topk_ids + rows.kept[r] * a_.k;
        if (!is_known(rows.kept[r])) continue;
        for (int64_t j = 0; j < a_.k; ++j) bin_logits(r)[j] = z(ids[j], r);
        if (!tail) continue;
        for (int64_t j = 0; j < a_.k; ++j) z(ids[j], r) = -std::numeric_limits<float>::infinity();
      }
    });
    if (tail)
      each_block([&](int thread, int64_t b) {
        const RowPanels s = student_.block(thread, b);
        for (int64_t p = 0; p < rows.panels; ++p) rest_stats_.measure(s.at(p, 0), classes(b), b, p);
      });
    for_items(threads_.count, rows.panels, [&](int, int64_t p) {
      TopkBins bins(a_);
      if (tail) rest_stats_.combine(p);
      for (int64_t r = p * kPanel; r < p * kPanel + rows.rows_of_panel(p); ++r) {
        if (!is_known(rows.kept[r])) {
          array(kSoft)[r] = array(kRest)[r] = array(kOnRest)[r] = kNan;
          continue;
        }
        double rest = 0, on_rest = 0;
        if (tail)
          rest = rest_stats_.maxima()[r] + std::log(static_cast<double>(rest_stats_.sums()[r]));
        const double soft =
            bins.evaluate(rows.kept[r], bin_logits(r), rest, bin_gradients(r), &on_rest);
        array(kSoft)[r] = static_cast<float>(a_.temperature * a_.temperature * soft);
        array(kRest)[r] = static_cast<float>(rest);
        array(kOnRest)[r] = static_cast<float>(array(kOnSoft)[r] * on_rest);
        // Left at -inf, an id gets nothing from the passes over all classes.
      }
    });
  }

  // The gradients of the ids' own logits.
  void scatter_bins(const RowChunk& rows, int64_t p) const {
    const RowPanels g = student_.whole();
    for (int64_t r = p * kPanel; r < p * kPanel + rows.rows_of_panel(p); ++r) {
      if (!is_known(rows.kept[r])) continue;
      const int64_t* ids = a_.topk_ids + rows.kept[r] * a_.k;
      const float max = student_stats_.maxima()[r], log_sum = array(kLogStudent)[r];
      for (int64_t j = 0; j < a_.k; ++j) {
        const float p_id = std::exp((bin_logits(r)[j] - max) - log_sum);
        g(ids[j], r) = array(kOnHard)[r] * p_id;
        if (soft_gradients_) g(ids[j], r) += array(kOnSoft)[r] * bin_gradients(r)[j];
      }
    }
  }

  const LinearDistillation& a_;
  bool unit_, gradients_, soft_gradients_, topk_;
  int64_t full_V_;
  std::vector<int64_t> kept_;
  RowChunks rows_;
  HeadThreads threads_;
  HeadChunk student_, teacher_;
  ClassBlocks blocks_;
  BlockStatistics student_stats_, teacher_stats_, rest_stats_;
  Scratch partial_, per_row_, bins_;
};

}  // namespace

void linear_distillation_loss(const LinearDistillation& args, int num_threads) {
  Distillation(args, num_threads).run();
}

}  // namespace mbm::MBM_ISA
