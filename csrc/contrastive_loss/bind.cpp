#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/problem_fields.h"
#include "contrastive_loss/contrastive_loss.h"

namespace {

#define MBM_CONTRASTIVE_LOSS_PROBLEM(FIELD) FIELD(B) FIELD(D) FIELD(kind)

struct ContrastiveLossProblem {
  MBM_PROBLEM_FIELDS("contrastive_loss_problem_fields", MBM_CONTRASTIVE_LOSS_PROBLEM)

  void check() const {
    mbm::check_field("B", B, 0, mbm::kMostElements);
    mbm::check_field("D", D, 0, mbm::kMostElements);
    mbm::check_field("kind", kind, 0, 1);
  }
};

// inputs and gradients: of image, text, scale and bias. 0 stands for null.
void bind_contrastive_loss(py::module_& m) {
  bind_problem_fields<ContrastiveLossProblem>(m);
  m.def("contrastive_loss",
        [](const py::bytes& problem, const std::array<Address, 4>& inputs, Address grad_loss,
           Address loss, const std::array<Address, 4>& gradients, int num_threads) {
          const auto p = mbm::read_block<ContrastiveLossProblem>(problem);
          const auto [image, text, scale, bias] = inputs;
          const auto [grad_image, grad_text, grad_scale, grad_bias] = gradients;
          mbm::ContrastiveLoss args{};
          args.B = p.B;
          args.D = p.D;
          args.kind = static_cast<mbm::ContrastiveKind>(p.kind);
          args.image = checked_ptr<const float>(image, p.B * p.D, "image");
          args.text = checked_ptr<const float>(text, p.B * p.D, "text");
          args.scale = checked_ptr<const float>(scale, 1, "scale");
          args.bias = optional_ptr<const float>(bias, 1, "bias");
          args.grad_loss = optional_ptr<const float>(grad_loss, 1, "grad_loss");
          args.loss = optional_ptr<float>(loss, 1, "loss");
          args.grad_image = optional_ptr<float>(grad_image, p.B * p.D, "grad_image");
          args.grad_text = optional_ptr<float>(grad_text, p.B * p.D, "grad_text");
          args.grad_scale = optional_ptr<float>(grad_scale, 1, "grad_scale");
          args.grad_bias = optional_ptr<float>(grad_bias, 1, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(contrastive_loss, args, num_threads);
        });
}

const Binding registered(bind_contrastive_loss);

}  // namespace
