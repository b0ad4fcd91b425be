// 2D convolution, bias, residual, activation and maximum pooling on the CPU, float32.
// B batch, C input and K output channels, Y X input, R S kernel; Y' X' after the convolution
// (conv_y, conv_x), Y'' X'' after the pool (out_y, out_x). Sizes are positive but B, which may be
// 0.
//
// Maps [B, C, Y, X] come with four strides in elements: channels_last (c = 1) or NCHW (x = 1).
// Inputs may alias one another; outputs alias nothing. All memory is the caller's and is used
// during the call only. Packed weights depend on the ISA that packed them.
//
// Results are bitwise the same for any num_threads: each sum has an order that the sizes decide.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "conv_bias_act/activation.h"

namespace mbm {

template <class T>
struct ConvMap {
  T* data;
  int64_t b, c, y, x;  // strides
  T* at(int64_t ib, int64_t ic, int64_t iy, int64_t ix) const {
    return data + ib * b + ic * c + iy * y + ix * x;
  }
};

struct ConvSizes {
  int64_t B, C, K, Y, X, R, S;
  int64_t stride_y, stride_x, top, left;  // padding above and to the left; may be negative
  int64_t dilation_y, dilation_x, groups;
  int64_t conv_y, conv_x, out_y, out_x;
  // 1, 1, 1, 1, 0, 0 without a pool. pool_y * pool_x <= 128.
  int64_t pool_y, pool_x, pool_stride_y, pool_stride_x, pool_top, pool_left;
  Activation activation;
};

// A weight [K, C / groups, R, S]: tap i of output k and input c at data + k * k_step + c * c_step +
// i * tap_step; one of c_step and tap_step is 1.
struct ConvWeight {
  int64_t K, C, R, S, groups;
  const float* data;
  int64_t k_step, c_step, tap_step;
};

// For which product a weight is packed, and by which algorithm.
struct ConvPacking {
  bool transposed;  // for grad_x: K and C change roles, the kernel is turned by 180 degrees
  bool winograd;    // R = S = 3, groups = 1; the convolution has stride 1 and dilation 1
  int64_t stride_y, stride_x, dilation_y, dilation_x;  // of the convolution; read where transposed
};

struct ConvForward {
  ConvSizes sizes;
  ConvMap<const float> x;         // [B, C, Y, X]
  const float* packed;            // conv_pack of the weight; null: by Winograd, from `weight`
  ConvWeight weight;              // read where packed is null
  bool weight_transposed;         // see ConvPacking
  const float* bias;              // [K] or null
  ConvMap<const float> residual;  // [B, K, Y', X'] or null data
  ConvMap<float> y;               // [B, K, Y'', X''], written
  // Saved for the backward, or null. A byte for each y: the place of its maximum in the window, row
  // by row, plus 128 where f' is the smaller of relu's, relu6's or leaky_relu's two values.
  uint8_t* places;  // [B, Y'', X'', K], written
  float* z;         // [B, Y'', X'', K], written: before the activation, for the other activations
};

struct ConvBackward {
  ConvSizes sizes;
  ConvMap<const float> grad_y;   // [B, K, Y'', X'']
  ConvMap<const float> x;        // [B, C, Y, X]; null unless grad_weight is wanted
  const float* packed;           // conv_pack of the weight, transposed; read for grad_x
  ConvWeight weight;             // read for grad_x where packed is null, as in the forward
  const uint8_t* places;         // from the forward; null where f' = 1 and nothing is pooled
  const float* z;                // from the forward, or null
  ConvMap<float> grad_x;         // [B, C, Y, X], written; null: not needed
  ConvMap<float> grad_residual;  // [B, K, Y', X'], written; null: not needed
  float* grad_weight;            // [K, C / groups, R, S], written; null: not needed
  float* grad_bias;              // [K], written; null: not needed
};

// Which algorithm conv_forward runs. kPlanes reads `weight`, kWinograd what is given, the others
// `packed`.
enum class ConvKernel { kDepthwise, kFew, kWinograd, kPixels, kPlanes, kDirect };

// Goes by sizes, strides, and whether there is a residual.
MBM_PER_ISA(ConvKernel, conv_kernel, (const ConvForward& args, bool winograd))
MBM_PER_ISA(int64_t, conv_packed_size, (const ConvWeight& weight, const ConvPacking& packing))
MBM_PER_ISA(void, conv_pack,
            (const ConvWeight& weight, const ConvPacking& packing, float* packed, int num_threads))
MBM_PER_ISA(void, conv_forward, (const ConvForward& args, bool winograd, int num_threads))
MBM_PER_ISA(void, conv_backward,
            (const ConvBackward& args, bool winograd_x, bool winograd_weight, int num_threads))

}  // namespace mbm
