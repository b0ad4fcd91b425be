#include <tuple>

#include "bind_cpu.h"
#include "common/isa.h"
#include "contrastive_loss/contrastive_loss.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "linear_distillation_loss/linear_distillation_loss.h"

namespace {

// 0 stands for null. sizes are N, H, V; gradients those of hidden, weight and bias.
void bind_linear_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy",
        [](std::tuple<int64_t, int64_t, int64_t> sizes, Address hidden, Address weight,
           Address bias, Address target, int64_t ignore_index, float label_smoothing, float softcap,
           float z_loss, int reduction, Address grad_loss, Address loss,
           std::tuple<Address, Address, Address> gradients, int num_threads) {
          const auto [N, H, V] = sizes;
          mbm::LinearCrossEntropy args{};
          args.N = N;
          args.H = H;
          args.V = V;
          args.hidden = checked_ptr<const float>(hidden, N * H, "hidden");
          args.weight = checked_ptr<const float>(weight, V * H, "weight");
          args.bias = optional_ptr<const float>(bias, V, "bias");
          args.target = checked_ptr<const int64_t>(target, N, "target");
          args.ignore_index = ignore_index;
          args.label_smoothing = label_smoothing;
          args.softcap = softcap;
          args.z_loss = z_loss;
          args.reduction = static_cast<mbm::RowReduction>(reduction);
          const int64_t results = args.reduction == mbm::RowReduction::kNone ? N : 1;
          args.grad_loss = optional_ptr<const float>(grad_loss, results, "grad_loss");
          args.loss = optional_ptr<float>(loss, results, "loss");
          args.grad_hidden = optional_ptr<float>(std::get<0>(gradients), N * H, "grad_hidden");
          args.grad_weight = optional_ptr<float>(std::get<1>(gradients), V * H, "grad_weight");
          args.grad_bias = optional_ptr<float>(std::get<2>(gradients), V, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(linear_cross_entropy, args, num_threads);
        });
}

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

// 0 stands for null; gradients are those of image, text, scale and bias.
void bind_contrastive_loss(py::module_& m) {
  m.def("contrastive_loss",
        [](int64_t B, int64_t D, int kind, Address image, Address text, Address scale, Address bias,
           Address grad_loss, Address loss,
           std::tuple<Address, Address, Address, Address> gradients, int num_threads) {
          mbm::ContrastiveLoss args{};
          args.B = B;
          args.D = D;
          args.kind = static_cast<mbm::ContrastiveKind>(kind);
          args.image = checked_ptr<const float>(image, B * D, "image");
          args.text = checked_ptr<const float>(text, B * D, "text");
          args.scale = checked_ptr<const float>(scale, 1, "scale");
          args.bias = optional_ptr<const float>(bias, 1, "bias");
          args.grad_loss = optional_ptr<const float>(grad_loss, 1, "grad_loss");
          args.loss = optional_ptr<float>(loss, 1, "loss");
          args.grad_image = optional_ptr<float>(std::get<0>(gradients), B * D, "grad_image");
          args.grad_text = optional_ptr<float>(std::get<1>(gradients), B * D, "grad_text");
          args.grad_scale = optional_ptr<float>(std::get<2>(gradients), 1, "grad_scale");
          args.grad_bias = optional_ptr<float>(std::get<3>(gradients), 1, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(contrastive_loss, args, num_threads);
        });
}

}  // namespace

void bind_losses(py::module_& m) {
  bind_contrastive_loss(m);
  bind_linear_cross_entropy(m);
  bind_linear_distillation_loss(m);
}
