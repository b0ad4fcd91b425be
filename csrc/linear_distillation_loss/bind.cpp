#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/problem_fields.h"
#include "linear_distillation_loss/linear_distillation_loss.h"

namespace {

// temperature, hard_weight and beta hold the bits of float64 numbers.
// clang-format off
#define MBM_LINEAR_DISTILLATION_PROBLEM(FIELD) \
  FIELD(N) FIELD(Hs) FIELD(Ht) FIELD(V) FIELD(k) FIELD(teacher) FIELD(temperature) \
  FIELD(hard_weight) FIELD(divergence) FIELD(beta) FIELD(ignore_index) FIELD(reduction)
// clang-format on

struct LinearDistillationProblem {
  MBM_PROBLEM_FIELDS("linear_distillation_problem_fields", MBM_LINEAR_DISTILLATION_PROBLEM)

  void check() const {
    for (const int64_t size : {N, Hs, Ht, V, k})
      mbm::check_field("a size", size, 0, mbm::kMostElements);
    mbm::check_field("teacher", teacher, 0, 2);
    mbm::check_field("divergence", divergence, 0, 2);
    mbm::check_field("reduction", reduction, 0, 2);
  }
};

// Addresses, 0 for null. Inputs are in the order of the operation's schema: student_hidden,
// student_weight, target, student_bias, teacher_hidden, teacher_weight, teacher_bias,
// teacher_logits, teacher_topk_ids, teacher_topk_log_probs. Results and their gradients: loss,
// hard, soft; gradients: of the student's hidden, weight and bias.
using Inputs = std::array<Address, 10>;
using Three = std::array<Address, 3>;

void bind_linear_distillation_loss(py::module_& m) {
  bind_problem_fields<LinearDistillationProblem>(m);
  m.def("linear_distillation_loss", [](const py::bytes& problem, const Inputs& inputs,
                                       const Three& grad_results, const Three& results,
                                       const Three& gradients, int num_threads) {
    const auto p = mbm::read_block<LinearDistillationProblem>(problem);
    const auto [student_hidden, student_weight, target, student_bias, teacher_hidden,
                teacher_weight, teacher_bias, teacher_logits, topk_ids, topk_log_probs] = inputs;
    const auto [grad_loss, grad_hard, grad_soft] = grad_results;
    const auto [loss, hard, soft] = results;
    const auto [grad_hidden, grad_weight, grad_bias] = gradients;
    mbm::LinearDistillation args{};
    args.N = p.N;
    args.Hs = p.Hs;
    args.Ht = p.Ht;
    args.V = p.V;
    args.k = p.k;
    args.teacher = static_cast<mbm::Teacher>(p.teacher);
    args.student_hidden = checked_ptr<const float>(student_hidden, p.N * p.Hs, "student_hidden");
    args.student_weight = checked_ptr<const float>(student_weight, p.V * p.Hs, "student_weight");
    args.student_bias = optional_ptr<const float>(student_bias, p.V, "student_bias");
    args.target = checked_ptr<const int64_t>(target, p.N, "target");
    args.teacher_hidden = optional_ptr<const float>(teacher_hidden, p.N * p.Ht, "teacher_hidden");
    args.teacher_weight = optional_ptr<const float>(teacher_weight, p.V * p.Ht, "teacher_weight");
    args.teacher_bias = optional_ptr<const float>(teacher_bias, p.V, "teacher_bias");
    args.teacher_logits = optional_ptr<const float>(teacher_logits, p.N * p.V, "teacher_logits");
    args.topk_ids = optional_ptr<const int64_t>(topk_ids, p.N * p.k, "topk_ids");
    args.topk_log_probs = optional_ptr<const float>(topk_log_probs, p.N * p.k, "topk_log_probs");
    args.ignore_index = p.ignore_index;
    args.temperature = mbm::real_field(p.temperature);
    args.hard_weight = mbm::real_field(p.hard_weight);
    args.beta = mbm::real_field(p.beta);
    args.divergence = static_cast<mbm::Divergence>(p.divergence);
    args.reduction = static_cast<mbm::RowReduction>(p.reduction);
    const int64_t count = args.reduction == mbm::RowReduction::kNone ? p.N : 1;
    args.grad_loss = optional_ptr<const float>(grad_loss, count, "grad_loss");
    args.grad_hard = optional_ptr<const float>(grad_hard, count, "grad_hard");
    args.grad_soft = optional_ptr<const float>(grad_soft, count, "grad_soft");
    args.loss = optional_ptr<float>(loss, count, "loss");
    args.hard = optional_ptr<float>(hard, count, "hard");
    args.soft = optional_ptr<float>(soft, count, "soft");
    args.grad_hidden = optional_ptr<float>(grad_hidden, p.N * p.Hs, "grad_hidden");
    args.grad_weight = optional_ptr<float>(grad_weight, p.V * p.Hs, "grad_weight");
    args.grad_bias = optional_ptr<float>(grad_bias, p.V, "grad_bias");
    py::gil_scoped_release release;
    MBM_CALL(linear_distillation_loss, args, num_threads);
  });
}

const Binding registered(bind_linear_distillation_loss);

}  // namespace
