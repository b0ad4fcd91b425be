#include <limits>
#include <string_view>

#include "common/gpu/bind.h"
#include "common/problem_fields.h"
#include "conv_bias_act/conv_bias_act_cuda.h"

namespace {

using mbm::gpu::Dtype;
using mbm::gpu::Place;

// Sizes as in conv_bias_act_cuda.h; strides in elements; z_dtype of what is saved.
// clang-format off
#define MBM_CONV_CUDA_PROBLEM(FIELD)                                                        \
  FIELD(B) FIELD(C) FIELD(K) FIELD(Y) FIELD(X) FIELD(R) FIELD(S)                            \
  FIELD(stride_y) FIELD(stride_x) FIELD(top) FIELD(left)                                    \
  FIELD(conv_y) FIELD(conv_x) FIELD(out_y) FIELD(out_x)                                     \
  FIELD(pool_y) FIELD(pool_x) FIELD(pool_stride_y) FIELD(pool_stride_x) FIELD(pool_top)     \
  FIELD(pool_left) FIELD(activation) FIELD(depthwise) FIELD(dtype) FIELD(z_dtype)           \
  FIELD(x_bytes)                                                                            \
  FIELD(x_b) FIELD(x_c) FIELD(x_y) FIELD(x_x)                                               \
  FIELD(residual_b) FIELD(residual_c) FIELD(residual_y) FIELD(residual_x)                   \
  FIELD(y_b) FIELD(y_c) FIELD(y_y) FIELD(y_x)                                               \
  FIELD(grad_x_b) FIELD(grad_x_c) FIELD(grad_x_y) FIELD(grad_x_x)                           \
  FIELD(grad_z_b) FIELD(grad_z_c) FIELD(grad_z_y) FIELD(grad_z_x)
// clang-format on

struct Problem {
  MBM_PROBLEM_FIELDS("conv_cuda_problem_fields", MBM_CONV_CUDA_PROBLEM)

  void check() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
    mbm::check_field("B", B, 0, mbm::kMostElements);
    for (int64_t size : {C, K, Y, X, R, S, conv_y, conv_x, out_y, out_x})
      mbm::check_field("a size", size, 1, kMost);
    for (int64_t step : {stride_y, stride_x, pool_y, pool_x, pool_stride_y, pool_stride_x})
      mbm::check_field("a step", step, 1, kMost);
    for (int64_t edge : {top, left, pool_top, pool_left})
      mbm::check_field("padding", edge, 0, int64_t{1} << 29);
    mbm::check_field("activation", activation, 0, static_cast<int64_t>(mbm::Activation::kTanh));
    for (int64_t flag : {depthwise, x_bytes}) mbm::check_field("a flag", flag, 0, 1);
    for (int64_t each : {dtype, z_dtype}) mbm::check_field("dtype", each, 0, 2);
  }

  mbm::ConvCudaSizes sizes() const {
    const auto narrow = [](int64_t x) { return static_cast<int>(x); };
    return {B,
            narrow(C),
            narrow(K),
            narrow(Y),
            narrow(X),
            narrow(R),
            narrow(S),
            narrow(stride_y),
            narrow(stride_x),
            narrow(top),
            narrow(left),
            narrow(conv_y),
            narrow(conv_x),
            narrow(out_y),
            narrow(out_x),
            narrow(pool_y),
            narrow(pool_x),
            narrow(pool_stride_y),
            narrow(pool_stride_x),
            narrow(pool_top),
            narrow(pool_left),
            static_cast<mbm::Activation>(activation),
            depthwise != 0,
            static_cast<Dtype>(dtype),
            narrow((depthwise ? 1 : C) * R * S),
            x_bytes != 0};
  }
  int64_t outputs() const { return B * K * out_y * out_x; }
  int64_t inputs() const { return B * C * Y * X; }
  int64_t convolved() const { return B * K * conv_y * conv_x; }

  void* map(Address address, int64_t count, const char* name) const {
    return mbm::gpu::optional_writable(address, dtype, count, name);
  }
  mbm::ConvCudaMap x(Address address) const {
    void* data = x_bytes ? checked_ptr<uint8_t>(address, inputs(), "x")
                         : mbm::gpu::writable(address, dtype, inputs(), "x");
    return {data, x_b, x_c, x_y, x_x};
  }
  mbm::ConvCudaSaved saved(Address places, Address z) const {
    return {optional_ptr<uint8_t>(places, outputs(), "places"),
            mbm::gpu::optional_writable(z, z_dtype, outputs(), "z"), static_cast<Dtype>(z_dtype)};
  }
};

// inputs: x, weight, bias, residual; outputs: y, places, z.
void forward(const py::bytes& problem, const Addresses<4>& inputs, const Addresses<3>& outputs,
             const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  const auto [x, weight, bias, residual] = inputs;
  mbm::ConvCudaForward args{};
  args.sizes = p.sizes();
  args.x = p.x(x);
  args.weight = mbm::gpu::pointer(weight, p.dtype, p.K * args.sizes.terms, "weight");
  args.bias = mbm::gpu::optional_pointer(bias, p.dtype, p.K, "bias");
  args.residual = {p.map(residual, p.convolved(), "residual"), p.residual_b, p.residual_c,
                   p.residual_y, p.residual_x};
  args.y = {mbm::gpu::writable(outputs[0], p.dtype, p.outputs(), "y"), p.y_b, p.y_c, p.y_y, p.y_x};
  args.saved = p.saved(outputs[1], outputs[2]);
  mbm::gpu::run(mbm::conv_cuda_fwd, args, place, "conv_bias_act");
}

// inputs: x, weight, the gradient of y, places, z; strides: of that gradient; outputs: the
// gradients of x, z, weight, bias, and the workspace.
void backward(const py::bytes& problem, const Addresses<5>& inputs,
              const std::array<int64_t, 4>& strides, const Addresses<5>& outputs,
              const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  const auto [x, weight, grad_y, places, z] = inputs;
  const auto [grad_x, grad_z, grad_weight, grad_bias, parts] = outputs;
  mbm::ConvCudaBackward args{};
  args.sizes = p.sizes();
  const int64_t weights = p.K * args.sizes.terms;
  args.x = p.x(x);
  args.weight = mbm::gpu::pointer(weight, p.dtype, weights, "weight");
  args.grad_y = {mbm::gpu::writable(grad_y, p.dtype, p.outputs(), "grad_y"), strides[0], strides[1],
                 strides[2], strides[3]};
  args.saved = p.saved(places, z);
  args.grad_x = {p.map(grad_x, p.inputs(), "grad_x"), p.grad_x_b, p.grad_x_c, p.grad_x_y,
                 p.grad_x_x};
  args.grad_z = {p.map(grad_z, p.convolved(), "grad_z"), p.grad_z_b, p.grad_z_c, p.grad_z_y,
                 p.grad_z_x};
  args.grad_weight = p.map(grad_weight, weights, "grad_weight");
  args.grad_bias = p.map(grad_bias, p.K, "grad_bias");
  args.parts = optional_ptr<float>(parts, mbm::conv_cuda_parts(args.sizes), "parts");
  mbm::gpu::run(mbm::conv_cuda_bwd, args, place, "conv_bias_act");
}

void bind_conv(py::module_& m) {
  bind_problem_fields<Problem>(m);
  m.def("conv_cuda_fwd", &forward);
  m.def("conv_cuda_bwd", &backward);
  m.def(
      "conv_cuda_parts",
      [](const py::bytes& problem) {
        return mbm::conv_cuda_parts(mbm::read_block<Problem>(std::string_view(problem)).sizes());
      },
      "Floats of the workspace of the gradients of weight and bias.");
  m.attr("conv_cuda_limits") =
      std::array{mbm::kConvCudaMostChannels, mbm::kConvCudaMostTaps, mbm::kConvCudaMostStride,
                 mbm::kConvCudaMostPool, mbm::kConvCudaMostDepthwisePool};
}

const Binding registered(bind_conv);

}  // namespace
