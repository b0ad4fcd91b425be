#include "common/bind.h"

#include <tuple>

#include "common/isa.h"
#include "contrastive_loss/contrastive_loss.h"

namespace {

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

const Binding registered(bind_contrastive_loss);

}  // namespace
