// A teacher known by k ids: both distributions over k + 1 bins, the last one for all other classes.
#pragma once

#include <cmath>
#include <vector>

#include "linear_distillation_loss/linear_distillation_loss.h"

namespace mbm::MBM_ISA {

// A tail is known as 1 - sum p, so to about this much and no better.
constexpr double kTailFloor = 0x1p-23;

class TopkBins {
 public:
  explicit TopkBins(const LinearDistillation& args)
      : a_(args), bins_(args.k + (args.k < args.V)), log_q_(size()), log_p_(size()), q_(size()) {}

  // Of row n: student logits of its ids and the logsumexp of all others. Returns the divergence,
  // and its gradients by those logits, times the temperature.
  double evaluate(int64_t n, const float* logits, double rest, float* gradients,
                  double* rest_gradient) {
    const int64_t k = a_.k;
    const float* given = a_.topk_log_probs + n * k;
    double mass = 0;
    for (int64_t i = 0; i < k; ++i) {
      const double l = given[i] < -1e30f ? -1e30 : static_cast<double>(given[i]);
      mass += std::exp(l);
      log_p_[at(i)] = l / a_.temperature;
      log_q_[at(i)] = logits[i] / static_cast<double>(a_.temperature);
    }
    if (bins_ > k) {
      const double tail = 1 - mass;
      log_p_[at(k)] = std::log(tail < kTailFloor ? kTailFloor : tail) / a_.temperature;
      log_q_[at(k)] = rest / a_.temperature;
    }
    normalise(log_p_);
    normalise(log_q_);
    return finish(gradients, rest_gradient);
  }

 private:
  size_t size() const { return static_cast<size_t>(a_.k + 1); }
  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  void normalise(std::vector<double>& x) const {
    double most = x[0], total = 0;
    for (int64_t i = 1; i < bins_; ++i) most = x[at(i)] > most ? x[at(i)] : most;
    for (int64_t i = 0; i < bins_; ++i) total += std::exp(x[at(i)] - most);
    const double shift = most + std::log(total);
    for (int64_t i = 0; i < bins_; ++i) x[at(i)] -= shift;
  }

  double finish(float* gradients, double* rest_gradient) {
    const bool jsd = a_.divergence == Divergence::kJsd;
    const bool forward = a_.divergence == Divergence::kForwardKl;
    const double beta = a_.beta, slope = a_.temperature * (jsd ? 1 - beta : 1.0);
    double from_p = 0, from_q = 0;
    for (int64_t i = 0; i < bins_; ++i) {
      const double log_p = log_p_[at(i)], log_q = log_q_[at(i)];
      const double p = std::exp(log_p), q = q_[at(i)] = std::exp(log_q);
      const double mixture = beta * p + (1 - beta) * q;
      const double log_m = jsd ? std::log(mixture > 1e-300 ? mixture : 1e-300) : 0;
      if (p > 0) from_p += p * (log_p - (jsd ? log_m : log_q));
      // log_p_ becomes the factor that its gradient is made of.
      log_p_[at(i)] = forward ? p : log_q - (jsd ? log_m : log_p);
      if (!forward && q > 0) from_q += q * log_p_[at(i)];
    }
    for (int64_t i = 0; i < bins_; ++i) {
      const double q = q_[at(i)], factor = log_p_[at(i)];
      const double gradient = forward ? q - factor : q > 0 ? q * (factor - from_q) : 0;
      if (i < a_.k)
        gradients[i] = static_cast<float>(slope * gradient);
      else
        *rest_gradient = slope * gradient;
    }
    return forward ? from_p : jsd ? beta * from_p + (1 - beta) * from_q : from_q;
  }

  const LinearDistillation& a_;
  int64_t bins_;
  std::vector<double> log_q_, log_p_, q_;
};

}  // namespace mbm::MBM_ISA
