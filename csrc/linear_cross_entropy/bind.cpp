#include "common/bind.h"

#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/problem_fields.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace {

// label_smoothing, softcap and z_loss hold the bits of float64 numbers.
// clang-format off
#define MBM_LINEAR_CROSS_ENTROPY_PROBLEM(FIELD) \
  FIELD(N) FIELD(H) FIELD(V) FIELD(ignore_index) \
  FIELD(label_smoothing) FIELD(softcap) FIELD(z_loss) FIELD(reduction)
// clang-format on

struct LinearCrossEntropyProblem {
  MBM_PROBLEM_FIELDS("linear_cross_entropy_problem_fields", MBM_LINEAR_CROSS_ENTROPY_PROBLEM)

  void check() const {
    mbm::check_field("N", N, 0, mbm::kMostElements);
    mbm::check_field("H", H, 0, mbm::kMostElements);
    mbm::check_field("V", V, 0, mbm::kMostElements);
    mbm::check_field("reduction", reduction, 0, 2);
  }
};

// inputs: hidden, weight, target, bias; gradients: of hidden, weight, bias. 0 stands for null.
void bind_linear_cross_entropy(py::module_& m) {
  bind_problem_fields<LinearCrossEntropyProblem>(m);
  m.def("linear_cross_entropy",
        [](const py::bytes& problem, const std::array<Address, 4>& inputs, Address grad_loss,
           Address loss, const std::array<Address, 3>& gradients, int num_threads) {
          const auto p = mbm::read_block<LinearCrossEntropyProblem>(problem);
          const auto [hidden, weight, target, bias] = inputs;
          const auto [grad_hidden, grad_weight, grad_bias] = gradients;
          mbm::LinearCrossEntropy args{};
          args.N = p.N;
          args.H = p.H;
          args.V = p.V;
          args.hidden = checked_ptr<const float>(hidden, p.N * p.H, "hidden");
          args.weight = checked_ptr<const float>(weight, p.V * p.H, "weight");
          args.bias = optional_ptr<const float>(bias, p.V, "bias");
          args.target = checked_ptr<const int64_t>(target, p.N, "target");
          args.ignore_index = p.ignore_index;
          args.label_smoothing = mbm::real_field(p.label_smoothing);
          args.softcap = mbm::real_field(p.softcap);
          args.z_loss = mbm::real_field(p.z_loss);
          args.reduction = static_cast<mbm::RowReduction>(p.reduction);
          const int64_t results = args.reduction == mbm::RowReduction::kNone ? p.N : 1;
          args.grad_loss = optional_ptr<const float>(grad_loss, results, "grad_loss");
          args.loss = optional_ptr<float>(loss, results, "loss");
          args.grad_hidden = optional_ptr<float>(grad_hidden, p.N * p.H, "grad_hidden");
          args.grad_weight = optional_ptr<float>(grad_weight, p.V * p.H, "grad_weight");
          args.grad_bias = optional_ptr<float>(grad_bias, p.V, "grad_bias");
          py::gil_scoped_release release;
          MBM_CALL(linear_cross_entropy, args, num_threads);
        });
}

const Binding registered(bind_linear_cross_entropy);

}  // namespace
