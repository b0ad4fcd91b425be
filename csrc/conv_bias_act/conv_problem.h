// What is the same in every call of a convolution: one block, filled once (problem.py), from which
// the arguments of a call are made with the addresses of its tensors. Only the binding reads it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/checked_ptr.h"
#include "common/problem_block.h"
#include "conv_bias_act/conv_bias_act.h"

namespace mbm {

// Fields of ConvProblem, each an int64: those of ConvSizes; strides in elements of x, residual, y,
// grad_x and grad_residual, and has_residual; the weight's steps of outputs,
// inputs and taps; whether forward and backward go by Winograd. Python fills them by name.
// clang-format off
#define MBM_CONV_PROBLEM(FIELD)                                                             \
  FIELD(B) FIELD(C) FIELD(K) FIELD(Y) FIELD(X) FIELD(R) FIELD(S)                            \
  FIELD(stride_y) FIELD(stride_x) FIELD(top) FIELD(left) FIELD(dilation_y)                  \
  FIELD(dilation_x) FIELD(groups) FIELD(conv_y) FIELD(conv_x) FIELD(out_y) FIELD(out_x)     \
  FIELD(pool_y) FIELD(pool_x) FIELD(pool_stride_y) FIELD(pool_stride_x) FIELD(pool_top)     \
  FIELD(pool_left) FIELD(activation)                                                        \
  FIELD(x_b) FIELD(x_c) FIELD(x_y) FIELD(x_x)                                               \
  FIELD(residual_b) FIELD(residual_c) FIELD(residual_y) FIELD(residual_x)                   \
  FIELD(y_b) FIELD(y_c) FIELD(y_y) FIELD(y_x)                                               \
  FIELD(grad_x_b) FIELD(grad_x_c) FIELD(grad_x_y) FIELD(grad_x_x)                           \
  FIELD(grad_residual_b) FIELD(grad_residual_c) FIELD(grad_residual_y) FIELD(grad_residual_x) \
  FIELD(weight_k) FIELD(weight_c) FIELD(weight_tap)                                         \
  FIELD(has_residual) FIELD(winograd_forward) FIELD(winograd_backward)
// clang-format on

struct ConvProblem {
  MBM_PROBLEM_FIELDS("conv_problem_fields", MBM_CONV_PROBLEM)

  // Kernels multiply steps by counts of pixels.
  void check() const {
    for (int64_t step :
         {stride_y, stride_x, dilation_y, dilation_x, pool_y, pool_x, pool_stride_y, pool_stride_x})
      check_step(step, 1);
    for (int64_t edge : {top, left, pool_top, pool_left}) check_step(edge, 0);
    if (activation < 0 || activation > static_cast<int64_t>(Activation::kTanh))
      throw std::invalid_argument("problem: got activation " + std::to_string(activation));
  }

  static void check_step(int64_t step, int64_t least) {
    if (step < least || step > int64_t{1} << 32)
      throw std::invalid_argument("sizes: got a stride, dilation, padding or window of " +
                                  std::to_string(step) + "; expected " + std::to_string(least) +
                                  " to 2^32; call mbm_kernels.conv_bias_act, which checks it");
  }

  ConvSizes sizes() const {
    return {B,
            C,
            K,
            Y,
            X,
            R,
            S,
            stride_y,
            stride_x,
            top,
            left,
            dilation_y,
            dilation_x,
            groups,
            conv_y,
            conv_x,
            out_y,
            out_x,
            pool_y,
            pool_x,
            pool_stride_y,
            pool_stride_x,
            pool_top,
            pool_left,
            static_cast<Activation>(activation)};
  }
  int64_t inputs() const { return B * C * Y * X; }
  int64_t outputs() const { return B * K * out_y * out_x; }
  int64_t convolved() const { return B * K * conv_y * conv_x; }
  int64_t weights() const { return K * (C / groups) * R * S; }
};

// Addresses, 0 for null.
struct ConvForwardInputs {
  uintptr_t x, packed, weight, bias, residual;
};
struct ConvForwardOutputs {
  uintptr_t y, places, z;
};
struct ConvBackwardInputs {
  uintptr_t x, packed, weight, places, z;
};
struct ConvGradients {
  uintptr_t x, weight, bias, residual;
};

// Packed or as it is, whichever is given; `needed`: one must be.
inline ConvWeight weight_of(const ConvProblem& p, uintptr_t packed, uintptr_t weight, bool needed) {
  checked_ptr<const float>(packed ? packed : weight, needed ? 1 : 0, "weight");
  const float* data = optional_ptr<const float>(weight, p.weights(), "weight");
  return {p.K, p.C, p.R, p.S, p.groups, data, p.weight_k, p.weight_c, p.weight_tap};
}

inline ConvForward forward_args(const ConvProblem& p, const ConvForwardInputs& in,
                                const ConvForwardOutputs& out) {
  ConvForward args{};
  args.sizes = p.sizes();
  args.x = {checked_ptr<const float>(in.x, p.inputs(), "x"), p.x_b, p.x_c, p.x_y, p.x_x};
  args.packed = optional_ptr<const float>(in.packed, 1, "packed");
  args.weight = weight_of(p, in.packed, in.weight, true);
  args.bias = optional_ptr<const float>(in.bias, p.K, "bias");
  args.residual = {optional_ptr<const float>(in.residual, p.convolved(), "residual"), p.residual_b,
                   p.residual_c, p.residual_y, p.residual_x};
  args.y = {checked_ptr<float>(out.y, p.outputs(), "y"), p.y_b, p.y_c, p.y_y, p.y_x};
  args.places = optional_ptr<uint8_t>(out.places, p.outputs(), "places");
  args.z = optional_ptr<float>(out.z, p.outputs(), "z");
  return args;
}

// Sizes and strides, by which a kernel is chosen.
inline ConvForward without_data(const ConvProblem& p) {
  static constexpr float residual = 0.0f;  // its address says that there is one
  ConvForward args{};
  args.sizes = p.sizes();
  args.x = {nullptr, p.x_b, p.x_c, p.x_y, p.x_x};
  args.weight = {p.K, p.C, p.R, p.S, p.groups, nullptr, p.weight_k, p.weight_c, p.weight_tap};
  args.residual = {p.has_residual ? &residual : nullptr, p.residual_b, p.residual_c, p.residual_y,
                   p.residual_x};
  args.y = {nullptr, p.y_b, p.y_c, p.y_y, p.y_x};
  return args;
}

// Throws std::invalid_argument unless the weight came in the form that the kernel reads.
inline void check_weight(const ConvForward& args, ConvKernel kernel) {
  const bool plain = args.weight.data != nullptr, packed = args.packed != nullptr;
  const bool given = kernel == ConvKernel::kPlanes     ? plain
                     : kernel == ConvKernel::kWinograd ? plain || packed
                                                       : packed;
  if (!given && args.sizes.B > 0)
    throw std::invalid_argument(
        std::string("weight: got it ") + (plain ? "plain" : "packed") +
        "; expected the other form, see conv_kernel; call mbm_kernels.conv_bias_act");
}

// grad_y of any strides, as it arrives.
inline ConvBackward backward_args(const ConvProblem& p, const ConvMap<const float>& grad_y,
                                  const ConvBackwardInputs& in, const ConvGradients& grads) {
  ConvBackward args{};
  args.sizes = p.sizes();
  args.grad_y = grad_y;
  checked_ptr<const float>(in.x, grads.weight ? p.inputs() : 0, "x");
  args.x = {optional_ptr<const float>(in.x, p.inputs(), "x"), p.x_b, p.x_c, p.x_y, p.x_x};
  args.packed = optional_ptr<const float>(in.packed, 1, "packed");
  args.weight = weight_of(p, in.packed, in.weight, grads.x != 0);
  args.places = optional_ptr<const uint8_t>(in.places, p.outputs(), "places");
  args.z = optional_ptr<const float>(in.z, p.outputs(), "z");
  args.grad_x = {optional_ptr<float>(grads.x, p.inputs(), "grad_x"), p.grad_x_b, p.grad_x_c,
                 p.grad_x_y, p.grad_x_x};
  args.grad_residual = {optional_ptr<float>(grads.residual, p.convolved(), "grad_residual"),
                        p.grad_residual_b, p.grad_residual_c, p.grad_residual_y, p.grad_residual_x};
  args.grad_weight = optional_ptr<float>(grads.weight, p.weights(), "grad_weight");
  args.grad_bias = optional_ptr<float>(grads.bias, p.K, "grad_bias");
  return args;
}

}  // namespace mbm
