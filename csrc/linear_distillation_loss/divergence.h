// The divergence of two tempered distributions on a panel of rows: student logits s and teacher
// logits t, [classes, kPanel], and what is known of each row after its statistics.
#pragma once

#include "common/activations.h"
#include "linear_distillation_loss/linear_distillation_loss.h"
#include "linear_head/row_statistics.h"

namespace mbm::MBM_ISA {

// A log-probability of the teacher below this counts as this: 0 * 1e30 is 0, 0 * inf is NaN.
constexpr float kLowestLogProb = -1e30f;
constexpr float kLeastMixture = 1.17549435e-38f;

// By row, [rows of a chunk].
struct RowTerms {
  const float *student_max, *teacher_max;
  const float* log_student;    // log sum exp(s - max)
  const float *log_q, *log_p;  // log sum exp((x - max) / T) of student and teacher
  float* on_hard;              // share of the loss's gradient on grad_hard
  float* on_soft;              // and on the divergence's gradient, times T (times 1 - beta for JSD)
  const float* mean_ratio;     // sum q r, for the reverse KL and JSD
  float inverse_temperature, beta;
};

// What every class of a vector of rows needs.
template <Divergence kind>
struct SoftVector {
  vf student_max, teacher_max, log_q, log_p, inverse, beta;
  SoftVector(const RowTerms& rows, int64_t r)
      : student_max(load(rows.student_max + r)),
        teacher_max(load(rows.teacher_max + r)),
        log_q(load(rows.log_q + r)),
        log_p(load(rows.log_p + r)),
        inverse(set1(rows.inverse_temperature)),
        beta(set1(rows.beta)) {}
  vf student(vf s) const { return (s - student_max) * inverse - log_q; }
  vf teacher(vf t) const {
    return max(set1(kLowestLogProb), (t - teacher_max) * inverse - log_p);  // NaN stays
  }
  vf log_mixture(vf p, vf q) const {
    return log(max(set1(kLeastMixture), beta * p + (set1(1.0f) - beta) * q));
  }
};

// sums[0][r] = sum p (log p - log q) for the forward KL; sum q r for the others, where r is
// log q - log p or log q - log m; sums[1][r] = sum p (log p - log m) for JSD.
template <Divergence kind>
void compare(const float* s, const float* t, int64_t classes, const RowTerms& rows, int64_t r,
             float* sum0, float* sum1) {
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    const SoftVector<kind> x(rows, r + j);
    vf first = zero(), second = zero();
    for (int64_t v = 0; v < classes; ++v) {
      const vf log_q = x.student(load(s + v * kPanel + j));
      const vf log_p = x.teacher(load(t + v * kPanel + j));
      if constexpr (kind == Divergence::kForwardKl) {
        first = fma(exp_or_zero(log_p), log_p - log_q, first);
      } else if constexpr (kind == Divergence::kReverseKl) {
        first = fma(exp_or_zero(log_q), log_q - log_p, first);
      } else {
        const vf p = exp_or_zero(log_p), q = exp_or_zero(log_q), log_m = x.log_mixture(p, q);
        first = fma(q, log_q - log_m, first);
        second = fma(p, log_p - log_m, second);
      }
    }
    store(sum0 + j, first);
    if (kind == Divergence::kJsd) store(sum1 + j, second);
  }
}

// s becomes its gradient but for the target's share; the forward KL is summed on the way.
template <Divergence kind>
void differentiate(float* s, const float* t, int64_t classes, const RowTerms& rows, int64_t r,
                   float* sum0) {
  const bool tempered = rows.inverse_temperature != 1.0f;
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    const SoftVector<kind> x(rows, r + j);
    const vf on_hard = load(rows.on_hard + r + j), on_soft = load(rows.on_soft + r + j);
    const vf log_student = load(rows.log_student + r + j);
    vf total = zero(), mean = zero();
    if (kind != Divergence::kForwardKl) mean = load(rows.mean_ratio + r + j);
    for (int64_t v = 0; v < classes; ++v) {
      float* at = s + v * kPanel + j;
      const vf logit = load(at), log_q = x.student(logit);
      const vf log_p = x.teacher(load(t + v * kPanel + j));
      const vf q = exp_or_zero(log_q);
      vf soft;
      if constexpr (kind == Divergence::kForwardKl) {
        const vf p = exp_or_zero(log_p);
        total = fma(p, log_p - log_q, total);
        soft = q - p;
      } else if constexpr (kind == Divergence::kReverseKl) {
        soft = q * ((log_q - log_p) - mean);
      } else {
        soft = q * ((log_q - x.log_mixture(exp_or_zero(log_p), q)) - mean);
      }
      const vf plain = tempered ? exp_or_zero((logit - x.student_max) - log_student) : q;
      store(at, fma(on_soft, soft, on_hard * plain));
    }
    if (kind == Divergence::kForwardKl) store(sum0 + j, total);
  }
}

// s becomes on_hard softmax(s), plus on_rest exp(s - rest) where `rest` is given.
inline void differentiate_hard(float* s, int64_t classes, const RowTerms& rows, int64_t r,
                               const float* on_rest, const float* rest) {
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    const vf max = load(rows.student_max + r + j), log_sum = load(rows.log_student + r + j);
    const vf on_hard = load(rows.on_hard + r + j);
    const vf on_rest_r = rest ? load(on_rest + r + j) : zero();
    const vf rest_r = rest ? load(rest + r + j) : zero();
    for (int64_t v = 0; v < classes; ++v) {
      float* at = s + v * kPanel + j;
      const vf logit = load(at);
      vf g = on_hard * exp_or_zero((logit - max) - log_sum);
      if (rest) g = fma(on_rest_r, exp_or_zero(logit - rest_r), g);
      store(at, g);
    }
  }
}

}  // namespace mbm::MBM_ISA
