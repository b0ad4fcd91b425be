#include "common/bind.h"

#include <tuple>

#include "common/isa.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

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

const Binding registered(bind_linear_cross_entropy);

}  // namespace
