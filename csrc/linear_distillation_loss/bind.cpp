#include "common/bind.h"

#include <tuple>

#include "common/isa.h"
#include "linear_distillation_loss/linear_distillation_loss.h"

namespace {

// sizes are N, Hs, Ht, V, k; student, teacher (hidden, weight, bias), topk (ids,
// log-probabilities); options: temperature, hard_weight, beta; results and their gradients: loss,
// hard, soft.
using Three = std::tuple<Address, Address, Address>;

void bind_linear_distillation_loss(py::module_& m) {
  m.def(
      "linear_distillation_loss",
      [](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes, Three student,
         Address target, Three teacher, Address teacher_logits, std::tuple<Address, Address> topk,
         int source, int64_t ignore_index, std::tuple<float, float, float> options, int divergence,
         int reduction, Three grad_results, Three results, Three gradients, int num_threads) {
        mbm::LinearDistillation args{};
        std::tie(args.N, args.Hs, args.Ht, args.V, args.k) = sizes;
        const auto [N, Hs, Ht, V, k] = sizes;
        const auto [student_hidden, student_weight, student_bias] = student;
        args.student_hidden = checked_ptr<const float>(student_hidden, N * Hs, "student_hidden");
        args.student_weight = checked_ptr<const float>(student_weight, V * Hs, "student_weight");
        args.student_bias = optional_ptr<const float>(student_bias, V, "student_bias");
        args.target = checked_ptr<const int64_t>(target, N, "target");
        const auto [teacher_hidden, teacher_weight, teacher_bias] = teacher;
        args.teacher_hidden = optional_ptr<const float>(teacher_hidden, N * Ht, "teacher_hidden");
        args.teacher_weight = optional_ptr<const float>(teacher_weight, V * Ht, "teacher_weight");
        args.teacher_bias = optional_ptr<const float>(teacher_bias, V, "teacher_bias");
        args.teacher_logits = optional_ptr<const float>(teacher_logits, N * V, "teacher_logits");
        args.topk_ids = optional_ptr<const int64_t>(std::get<0>(topk), N * k, "topk_ids");
        args.topk_log_probs = optional_ptr<const float>(std::get<1>(topk), N * k, "topk_log_probs");
        args.teacher = static_cast<mbm::Teacher>(source);
        args.ignore_index = ignore_index;
        std::tie(args.temperature, args.hard_weight, args.beta) = options;
        args.divergence = static_cast<mbm::Divergence>(divergence);
        args.reduction = static_cast<mbm::RowReduction>(reduction);
        const int64_t count = args.reduction == mbm::RowReduction::kNone ? N : 1;
        args.grad_loss = optional_ptr<const float>(std::get<0>(grad_results), count, "grad_loss");
        args.grad_hard = optional_ptr<const float>(std::get<1>(grad_results), count, "grad_hard");
        args.grad_soft = optional_ptr<const float>(std::get<2>(grad_results), count, "grad_soft");
        args.loss = optional_ptr<float>(std::get<0>(results), count, "loss");
        args.hard = optional_ptr<float>(std::get<1>(results), count, "hard");
        args.soft = optional_ptr<float>(std::get<2>(results), count, "soft");
        args.grad_hidden = optional_ptr<float>(std::get<0>(gradients), N * Hs, "grad_hidden");
        args.grad_weight = optional_ptr<float>(std::get<1>(gradients), V * Hs, "grad_weight");
        args.grad_bias = optional_ptr<float>(std::get<2>(gradients), V, "grad_bias");
        py::gil_scoped_release release;
        MBM_CALL(linear_distillation_loss, args, num_threads);
      });
}

const Binding registered(bind_linear_distillation_loss);

}  // namespace
